//! Two decoders of one origin that hold what they have in common once.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use super::decoder::Decoder;
use crate::error::Result;

/// Values that tell most tensors apart at little cost.
const VALUES: usize = 16;

impl Decoder {
    /// The same decoder, holding `other`'s tensors where its own are equal to them: a model and one that was made of it
    /// and read from another file then take the room of what differs between them. No two of its tensors become one.
    ///
    /// # Errors
    /// A failed computation.
    pub fn sharing(&self, other: &Self) -> Result<Self> {
        let mut known: HashMap<(Vec<usize>, Vec<u32>), Vec<Tensor>> = HashMap::new();
        for tensor in other.tensors() {
            known.entry(key(tensor)?).or_default().push(tensor.clone());
        }
        self.map(|_, value| {
            let alike = known.entry(key(value)?).or_default();
            for (place, tensor) in alike.iter().enumerate() {
                if equal(tensor, value)? {
                    // Each is given away once: what is trained in one place must not move another.
                    return Ok(alike.remove(place));
                }
            }
            Ok(value.clone())
        })
    }
}

/// The shape and the first few values.
fn key(tensor: &Tensor) -> Result<(Vec<usize>, Vec<u32>)> {
    let first = tensor.flatten_all()?.narrow(0, 0, tensor.elem_count().min(VALUES))?;
    let values = first.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    Ok((tensor.dims().to_vec(), values.into_iter().map(f32::to_bits).collect()))
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dtype() != b.dtype() || !a.device().same_device(b.device()) {
        return Ok(false);
    }
    Ok(a.ne(b)?.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>()? == 0.0)
}
