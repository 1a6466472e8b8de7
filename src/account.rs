//! What a model takes: parameters, bytes, work.

use std::collections::HashSet;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::compact_bytes;
use crate::error::Result;
use crate::model::{Architecture, Decoder, NormPart, Param, Part, Projection, StoredTypes};
use crate::ops::Matrix;

/// What a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Account {
    /// Parameters; what depths share counts once.
    pub parameters: usize,
    /// Bytes of all tensors in a compact checkpoint.
    pub stored_bytes: u64,
    /// Bytes of all tensors in memory, and of the blocks of quantised matrices. Where the CPU has kernels for it, and
    /// rows are multiples of 256, candle keeps a second copy of such blocks from its first product on, in the order in
    /// which those kernels read them; nothing tells of it from outside, and it is not counted.
    pub resident_bytes: u64,
    /// Floating-point operations for one more token that sees `context` tokens, itself included: two for each
    /// multiply-add of a matrix (projections, residuals, head) and of attention's two products, one for each scale.
    /// Norms, biases, activations and RoPE are not counted. Sharing saves none.
    pub flops_per_token: u64,
    /// Bytes of keys and values that each token adds to the cache: every depth has its own.
    pub kv_bytes_per_token: u64,
}

/// The types and the context for which an [`Account`] is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The types of the tensors on disk: one for all (`DType::BF16.into()`), those of a checkpoint, or of a decoder.
    pub stored: StoredTypes,
    /// The type of matrices in memory, on the CPU: beside those of half precision vectors, keys and values are f32.
    pub resident: DType,
    /// Tokens that a token sees, itself included.
    pub context: usize,
}

impl Account {
    /// What a decoder of this architecture takes, from the architecture alone: for a folded one,
    /// [`Plan::architecture`](crate::Plan::architecture).
    #[must_use]
    pub fn planned(arch: &Architecture, held: &Held) -> Self {
        let params = arch.params();
        let sizes = || params.iter().map(|(param, shape)| (*param, shape.iter().product::<usize>()));
        let resident = |param: Param| param.dtype_on_cpu(held.resident).size_in_bytes();
        let head = 2 * arch.vocab_size * arch.hidden_size;
        let blocks: usize = (0..arch.depth()).map(|depth| block_flops(arch, depth, held.context)).sum();
        let attending = (0..arch.depth()).filter(|&depth| arch.fold.block(depth).has(Part::Attention));
        let activations = Param::FinalNorm(NormPart::Gain).dtype_on_cpu(held.resident);
        let kv = 2 * arch.key_width() * activations.size_in_bytes();
        Self {
            parameters: arch.parameter_count(),
            stored_bytes: held.stored.bytes_of(arch),
            resident_bytes: sizes().map(|(param, size)| size * resident(param)).sum::<usize>() as u64,
            flops_per_token: (head + blocks) as u64,
            kv_bytes_per_token: (attending.count() * kv) as u64,
        }
    }

    /// What a decoder in memory takes, counted from its tensors; bytes on disk are those that it would take if it were
    /// saved now.
    ///
    /// # Errors
    /// A failed computation of the one token that fills a cache.
    pub fn counted(decoder: &Decoder, context: usize) -> Result<Self> {
        let arch = decoder.architecture();
        let mut flops = 2 * arch.vocab_size * arch.hidden_size;
        for block in decoder.blocks() {
            for projection in Projection::ALL {
                let adapter = &block.own.adapters[projection];
                let residual = adapter.low_rank.iter().flat_map(|residual| [&residual.a, &residual.b]);
                let matrix = block.weights.get(projection).map(Matrix::elem_count);
                let products = matrix.into_iter().chain(residual.map(Tensor::elem_count));
                flops += 2 * products.sum::<usize>();
                flops += adapter.scale.as_ref().map_or(0, Tensor::elem_count);
            }
            if let Some(output) = block.weights.get(Projection::O) {
                let seen = block.own.spec.window.map_or(context, |window| window.min(context));
                flops += 4 * seen * output.dims2()?.1;
            }
        }
        let mut cache = decoder.cache();
        decoder.extend(&Tensor::zeros((1, 1), DType::U32, decoder.device())?, &mut cache)?;
        Ok(Self {
            parameters: decoder.parameter_count(),
            stored_bytes: compact_bytes(decoder)?,
            resident_bytes: resident_bytes(decoder),
            flops_per_token: flops as u64,
            kv_bytes_per_token: cache.bytes_per_token() as u64,
        })
    }
}

/// The work of one block for one token.
fn block_flops(arch: &Architecture, depth: usize, context: usize) -> usize {
    let block = arch.fold.block(depth);
    let there = Projection::ALL.into_iter().filter(|projection| block.has(projection.half()));
    let products = there.filter_map(|projection| {
        let (output, input) = arch.projection_shape(projection)?;
        let adapter = block.adapters.get(&projection).copied().unwrap_or_default();
        let scaled = if adapter.scale { output } else { 0 };
        Some(2 * output * input + 2 * adapter.rank * (output + input) + scaled)
    });
    let window = arch.blocks.get(depth).and_then(|spec| spec.window);
    let seen = window.map_or(context, |window| window.min(context));
    let attention = if block.has(Part::Attention) { 4 * seen * arch.query_width() } else { 0 };
    products.sum::<usize>() + attention
}

/// The bytes of all storages that a decoder keeps alive, each once.
fn resident_bytes(decoder: &Decoder) -> u64 {
    let mut seen = HashSet::new();
    let storages = decoder.tensors().map(|tensor| {
        let (storage, _) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) if seen.insert(std::ptr::from_ref(cpu)) => {
                cpu_bytes(cpu).unwrap_or_else(|| bytes(tensor))
            }
            Storage::Cpu(_) => 0,
            // Other devices do not tell; a tensor there is as large as its elements.
            _ => bytes(tensor),
        }
    });
    let quantized = decoder.quantized_matrices().map(|(_, blocks)| blocks.storage_size_in_bytes());
    storages.chain(quantized).sum::<usize>() as u64
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

fn cpu_bytes(storage: &CpuStorage) -> Option<usize> {
    match storage {
        CpuStorage::F64(values) => Some(size_of_val(values.as_slice())),
        CpuStorage::F32(values) => Some(size_of_val(values.as_slice())),
        CpuStorage::BF16(values) => Some(size_of_val(values.as_slice())),
        CpuStorage::F16(values) => Some(size_of_val(values.as_slice())),
        _ => None,
    }
}
