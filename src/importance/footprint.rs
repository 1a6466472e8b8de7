//! What scoring takes in memory, counted before it begins.

use candle_core::DType;

use super::{Method, MethodOptions};
use crate::account::{Account, Held};
use crate::checkpoint::Checkpoint;
use crate::data::Windows;
use crate::model::{Architecture, BlockParam, NormSite, Param, Part, Projection};

/// What is counted, and a sixteenth of it for what is not: what the allocator keeps, code, threads, a tokenizer.
pub(crate) fn with_overhead(counted: u64) -> u64 {
    counted.saturating_add(counted / 16)
}

/// What may be counted of so many bytes.
pub(crate) fn without_overhead(bytes: u64) -> u64 {
    bytes / 17 * 16
}

/// Rows whose logits exist at once, with as many numbers on their way to a loss.
const ROWS: u64 = 2 * 128;

/// Counts weights, states and activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Footprint<'a> {
    arch: &'a Architecture,
    /// What matrices are held in.
    dtype: DType,
    windows: u64,
    seq_len: u64,
}

impl<'a> Footprint<'a> {
    pub(crate) fn new(arch: &'a Architecture, dtype: DType, windows: &Windows) -> Self {
        Self { arch, dtype, windows: windows.len() as u64, seq_len: windows.seq_len() as u64 }
    }

    /// All weights.
    pub(crate) fn weights(&self) -> u64 {
        let held = Held { stored: self.dtype.into(), resident: self.dtype, context: 1 };
        Account::planned(self.arch, &held).resident_bytes
    }

    /// One hidden state of a window.
    pub(crate) fn state(&self) -> u64 {
        self.seq_len * self.arch.hidden_size as u64 * 4
    }

    /// The activations of one block on one window.
    pub(crate) fn activations(&self) -> u64 {
        let wide = self.arch.hidden_size * 8 + self.arch.intermediate_size * 3;
        self.seq_len * wide as u64 * 4
    }

    /// What one block computes of one window, where all of it is kept for the way back.
    fn kept_activations(&self) -> u64 {
        use Projection::{K, Q, Up};
        let width = |projection| self.arch.projection_shape(projection).map_or(0, |(output, _)| output);
        let products: usize = Projection::ALL.into_iter().map(width).sum();
        // Rotated queries and keys, what attention has gathered, and the activation.
        let between = 2 * width(Q) + width(K) + width(Up);
        let norms: usize = NormSite::ALL.into_iter().filter_map(|site| self.normalised(site)).sum();
        // The block's input, the state between its halves, and its output.
        let states = 3 * self.arch.hidden_size;
        self.seq_len * (products + between + norms + states) as u64 * 4
    }

    /// How many numbers a norm makes of a token, where there is one.
    fn normalised(&self, site: NormSite) -> Option<usize> {
        let projection = match site {
            NormSite::Q => Projection::Q,
            NormSite::K => Projection::K,
            NormSite::AttentionIn | NormSite::AttentionOut | NormSite::MlpIn | NormSite::MlpOut => {
                Projection::O
            }
        };
        self.arch.norm_width(site).and(self.arch.projection_shape(projection)).map(|(output, _)| output)
    }

    /// The same backwards: every activation has a gradient, and one to add to it.
    fn activations_back(&self) -> u64 {
        3 * self.activations()
    }

    /// What takes the most on the way back of so many windows at once: a block, or the head.
    pub(crate) fn back(&self, windows: u64) -> u64 {
        // The student's logits and the teacher's, each with as many numbers on their way.
        let logits = 2 * ROWS * self.arch.vocab_size as u64 * 4;
        self.activations_back().saturating_mul(windows).max(logits)
    }

    /// What a method has in memory beside the weights and the activations of one block.
    pub(crate) fn kept(&self, method: Method, options: &MethodOptions) -> u64 {
        let depth = self.arch.depth() as u64;
        let checkpointing = match method {
            Method::Gates => options.gates.gradient_checkpointing,
            Method::Coupling => options.coupling.gates.gradient_checkpointing,
            _ => true,
        };
        match method {
            _ if !checkpointing => depth * self.kept_activations() + self.back(1),
            Method::Taylor => 2 * 4 * depth * self.arch.parameters_of(Part::Whole) as u64 + self.back(1),
            Method::Coupling | Method::Gates => 2 * depth * self.state() + self.back(1),
            Method::GreedyPerplexity | Method::MacroInfluence => self.windows * (depth + 1) * self.state(),
            _ => depth * self.state(),
        }
    }

    /// All weights in memory, and beside them, whichever takes more: reading them, or computing, where each core has the
    /// activations of a block and `kept` bytes stay.
    pub(crate) fn in_memory(&self, checkpoint: &Checkpoint, kept: u64) -> u64 {
        let computing = kept + self.activations() * rayon::current_num_threads() as u64;
        self.weights() + computing.max(checkpoint.loading_bytes(self.dtype))
    }

    /// Scoring with blocks read from disk one at a time, but for the states between blocks.
    pub(crate) fn streamed(&self, checkpoint: &Checkpoint, method: Method, options: &MethodOptions) -> u64 {
        let (activations, states) = match method {
            // Each window of a batch has a state and the gradient with respect to it.
            Method::Gates => {
                (self.activations_back(), (options.gates.batch as u64).saturating_mul(2).saturating_add(4))
            }
            Method::BlockInfluence | Method::Angular => {
                let cores = (rayon::current_num_threads() as u64).min(self.windows);
                (cores.saturating_mul(self.activations()), cores.saturating_mul(4))
            }
            _ => (self.activations(), 4),
        };
        (self.weights_streamed(checkpoint) + activations).saturating_add(states.saturating_mul(self.state()))
    }

    /// Two blocks, what it takes to read one, and one of the ends: an allocator may keep what an end has given back.
    fn weights_streamed(&self, checkpoint: &Checkpoint) -> u64 {
        let block = (0..self.arch.depth()).map(|depth| self.block(depth)).max().unwrap_or_default();
        let (beside_blocks, end) = checkpoint.reading_bytes(self.dtype);
        2 * block + beside_blocks + end + ROWS * self.arch.vocab_size as u64 * 4
    }

    /// A block that is read alone: its matrices, whichever depth holds them, and its adapters.
    fn block(&self, depth: usize) -> u64 {
        let bytes = |param: BlockParam, size: usize| {
            (size * Param::Block(depth, param).dtype_on_cpu(self.dtype).size_in_bytes()) as u64
        };
        let own = self.arch.block_params().into_iter();
        let own = own.map(|(param, shape)| bytes(param, shape.iter().product()));
        let adapters =
            self.arch.fold.block(depth).adapters.into_iter().filter_map(|(projection, adapter)| {
                let (output, input) = self.arch.projection_shape(projection)?;
                let scale = if adapter.scale { bytes(BlockParam::Scale(projection), output) } else { 0 };
                Some(scale + bytes(BlockParam::LoraA(projection), adapter.rank * (output + input)))
            });
        own.chain(adapters).sum()
    }

    /// The states between blocks, where none lies on disk.
    pub(crate) fn states(&self, method: Method, options: &MethodOptions) -> u64 {
        let depth = self.arch.depth() as u64;
        let count = match method {
            Method::Perplexity => self.windows * (depth + 1),
            Method::Gates => {
                let units = depth * if options.gates.halves { 2 } else { 1 };
                units.saturating_mul(options.gates.batch as u64)
            }
            _ => self.windows,
        };
        count.saturating_mul(self.state())
    }
}
