//! A model whose blocks are read from disk one at a time.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Device};

use super::layout::Stored;
use super::parts::Parts;
use super::{Checkpoint, Source};
use crate::error::{Error, Result};
use crate::model::{Architecture, Block, BlockSource, Decoder, Param, States};
use crate::ops::Kernels;

/// What a streamed model may take beside the weights that it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Hidden states between blocks lie in memory up to this many bytes, and beyond that in a scratch file; all in
    /// memory where absent.
    pub state_bytes: Option<u64>,
    /// The directory of the scratch file, which has no name and is gone with the process; the system's one for
    /// temporary files where absent. A directory that is itself in memory spares none.
    pub scratch: Option<PathBuf>,
}

/// A model whose blocks are read from disk one at a time, the next one while the present one computes: two blocks are
/// in memory at most, and the embedding and the head while they are needed.
///
/// What is computed with it is what [`Checkpoint::decoder`] gives, bit for bit. Every pass over the blocks reads them
/// from disk once: one for Block Influence, angular distance and perplexity; two for each step of gates, and one
/// more, which tells the model from others, where the gates keep their state in a file.
///
/// ```
/// use foldgpt::checkpoint::StreamOptions;
/// use foldgpt::importance::{BlockInfluence, Importance};
/// use foldgpt::{Bos, Checkpoint, Windows, candle::{DType, Device}};
///
/// let checkpoint = Checkpoint::open("examples/tiny-stories")?;
/// let text = "Once there was a kite. ".repeat(40);
/// let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 64, Some(2), Bos::Auto)?;
///
/// let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, StreamOptions::default())?;
/// let scores = BlockInfluence::default().score_streamed(&streamed, &windows, &mut ())?;
///
/// let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
/// let same = BlockInfluence::default().score(&decoder, &windows, &mut ())?;
/// assert_eq!(scores.importance(), same.importance());
/// # Ok::<(), foldgpt::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StreamedDecoder<'a> {
    checkpoint: &'a Checkpoint,
    /// That of the blocks that are kept.
    architecture: Architecture,
    kept: Vec<usize>,
    dtype: DType,
    device: Device,
    options: StreamOptions,
}

impl Checkpoint {
    /// The model with its blocks left on disk, to be read when they are computed with. Reads nothing yet.
    ///
    /// `dtype` and `device` are those of [`decoder`](Self::decoder).
    ///
    /// # Errors
    /// A type that no weights have, or a checkpoint that is not on disk.
    pub fn streamed(
        &self,
        dtype: DType,
        device: &Device,
        options: StreamOptions,
    ) -> Result<StreamedDecoder<'_>> {
        self.check_types(dtype)?;
        if let Source::New(_) = self.source {
            return Err(Error::format(&self.location, "the model has no weights on disk yet"));
        }
        let architecture = self.architecture.clone();
        let kept = (0..architecture.depth()).collect();
        Ok(StreamedDecoder { checkpoint: self, architecture, kept, dtype, device: device.clone(), options })
    }

    /// The most bytes that reading one tensor takes for a decoder of this type: of those of blocks, without what it
    /// becomes; of all others, with that.
    pub(crate) fn reading_bytes(&self, dtype: DType) -> (u64, u64) {
        let held = dtype.size_in_bytes();
        let (mut of_blocks, mut of_ends) = (0, 0);
        for stored in &self.tensors {
            let (count, worst) = (stored.shape.iter().product::<usize>(), self.worst_moment(stored, held));
            match stored.params.first() {
                Some((Param::Block(..), _)) => of_blocks = of_blocks.max(count * worst.saturating_sub(held)),
                _ => of_ends = of_ends.max(count * worst),
            }
        }
        (of_blocks as u64, of_ends as u64)
    }

    /// The most bytes that reading one tensor takes beside all that is held, for a decoder of this type.
    pub(crate) fn loading_bytes(&self, dtype: DType) -> u64 {
        let held = dtype.size_in_bytes();
        let beside = |stored: &Stored| {
            let count = stored.shape.iter().product::<usize>();
            count * self.worst_moment(stored, held).saturating_sub(held)
        };
        self.tensors.iter().map(beside).max().unwrap_or_default() as u64
    }

    /// Bytes for each number of a tensor at the worst moment of reading it, where it will be held in `held` of them.
    fn worst_moment(&self, stored: &Stored, held: usize) -> usize {
        let written = self.stored_dtype(&stored.name).size_in_bytes();
        match &self.source {
            Source::Safetensors(tensors) => {
                let entry = self.entry(tensors, &stored.name);
                let on_disk = entry.map_or(written, |(_, entry)| entry.dtype.size_in_bytes());
                // As it lies in the file and as a tensor, that and what it is rounded to, that and what it becomes; and
                // where it is taken apart or turned, that twice.
                let copied = stored.transposed || stored.params.len() > 1;
                let apart = if copied { 2 * held } else { held };
                (2 * on_disk).max(on_disk + written).max(written + held).max(apart)
            }
            // Numbers in f32 in two layouts beside the blocks of the file; then those that they become.
            Source::Gguf(_) | Source::New(_) => (4 + written + held).max(10),
        }
    }
}

impl StreamedDecoder<'_> {
    /// What the model is made of.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The number of blocks.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.kept.len()
    }

    /// The same model with only the blocks of `kept`, in that order.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] for an index beyond the depth.
    pub fn with_blocks(&self, kept: &[usize]) -> Result<Self> {
        let architecture = self.architecture.with_blocks(kept)?;
        Ok(Self { architecture, kept: self.originals(kept)?, ..self.clone() })
    }

    /// Where blocks of these indices are in the checkpoint.
    fn originals(&self, indices: &[usize]) -> Result<Vec<usize>> {
        let depth = self.depth();
        let original =
            |&index: &usize| self.kept.get(index).copied().ok_or(Error::NoSuchBlock { index, depth });
        indices.iter().map(original).collect()
    }

    /// Reads the block that the checkpoint has at `depth`, unless nobody waits for it any more.
    fn read(&self, depth: usize, abandoned: &AtomicBool) -> Result<Block> {
        let mut parts = Parts::new(self.checkpoint, self.dtype, &self.device);
        Block::alone(&self.checkpoint.architecture, depth, |param| {
            if abandoned.load(Ordering::Relaxed) {
                return Err(Error::Cancelled { stage: "load" });
            }
            parts.param(param)
        })
    }

    fn ends(&self, matrix: Param) -> Result<Decoder> {
        let mut parts = Parts::new(self.checkpoint, self.dtype, &self.device);
        Decoder::ends(&self.architecture, matrix, |param| parts.param(param))
    }
}

impl BlockSource for StreamedDecoder<'_> {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn kernels(&self) -> Kernels {
        Kernels::default()
    }

    fn front(&self) -> Result<Decoder> {
        self.ends(Param::Embedding)
    }

    fn back(&self) -> Result<Decoder> {
        self.ends(if self.architecture.tied { Param::Embedding } else { Param::Head })
    }

    fn visit(&self, order: &[usize], visit: &mut dyn FnMut(&Block) -> Result<()>) -> Result<()> {
        let depths = self.originals(order)?;
        let abandoned = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // A channel that stores nothing: the reader waits with a block until the one before it is gone.
            let (sender, receiver) = sync_channel::<Result<Block>>(0);
            let abandoned = &abandoned;
            let read = move || {
                for depth in depths {
                    let block = self.read(depth, abandoned);
                    let failed = block.is_err();
                    if sender.send(block).is_err() || failed {
                        return;
                    }
                }
            };
            let reader = std::thread::Builder::new().spawn_scoped(scope, read);
            let reader = reader.map_err(Error::io("start a thread that reads", &self.checkpoint.location))?;
            let ended = |_| Error::format(&self.checkpoint.location, "the reader of blocks ended");
            let done = order.iter().try_for_each(|_| visit(&receiver.recv().map_err(ended)??));
            // The reader may be in the middle of a block, or wait with one.
            abandoned.store(true, Ordering::Relaxed);
            drop(receiver);
            // A reader that panicked has sent nothing, so that `done` tells of it.
            reader.join().ok();
            done
        })
    }

    fn windows_at_once(&self) -> usize {
        usize::MAX
    }

    fn keeps_blocks(&self) -> bool {
        false
    }

    fn states(&self, slots: usize) -> States {
        let scratch = self.options.scratch.clone().unwrap_or_else(std::env::temp_dir);
        States::new(slots, self.options.state_bytes, scratch)
    }
}
