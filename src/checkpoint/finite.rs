//! Whether numbers are finite, as tensors hold them and as they are stored.

use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::{bf16, f16};

/// Whether all numbers of a tensor on the CPU are finite.
pub(super) fn is_finite(tensor: &Tensor) -> bool {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => all_finite(values, f32::is_finite),
        Storage::Cpu(CpuStorage::F64(values)) => all_finite(values, f64::is_finite),
        Storage::Cpu(CpuStorage::BF16(values)) => all_finite(values, bf16::is_finite),
        Storage::Cpu(CpuStorage::F16(values)) => all_finite(values, f16::is_finite),
        _ => false,
    }
}

/// Whether all numbers of this type are finite, as they are stored.
pub(super) fn are_finite(bytes: &[u8], dtype: DType) -> bool {
    match dtype {
        DType::F32 => all_finite(bytes.as_chunks().0, |number| f32::from_le_bytes(number).is_finite()),
        DType::F64 => all_finite(bytes.as_chunks().0, |number| f64::from_le_bytes(number).is_finite()),
        DType::BF16 => all_finite(bytes.as_chunks().0, |number| bf16::from_le_bytes(number).is_finite()),
        DType::F16 => all_finite(bytes.as_chunks().0, |number| f16::from_le_bytes(number).is_finite()),
        _ => false,
    }
}

/// Without an early end, since a loop that has one does not vectorise; and on the thread that asks: the one that reads
/// ahead for a streamed model must not wait for threads that may all be waiting for it.
fn all_finite<T: Copy>(numbers: &[T], finite: impl Fn(T) -> bool) -> bool {
    numbers.iter().fold(true, |all, number| all & finite(*number))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn one_number_among_many_is_found_wherever_it_is() {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [None, Some(0), Some(500), Some(1000)] {
                    let mut values = vec![-1.5f32; 1001];
                    if let Some(place) = place {
                        values[place] = value;
                    }
                    let tensor = Tensor::from_vec(values, 1001, &Device::Cpu).unwrap();
                    let tensor = tensor.to_dtype(dtype).unwrap();
                    let mut bytes = Vec::new();
                    tensor.write_bytes(&mut bytes).unwrap();
                    let found = (is_finite(&tensor), are_finite(&bytes, dtype));
                    assert_eq!(found, (place.is_none(), place.is_none()), "{dtype:?} {value} {place:?}");
                }
            }
        }
        let counts = Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap();
        assert!(!is_finite(&counts) && !are_finite(&[0; 12], DType::U32));
    }
}
