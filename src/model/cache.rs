//! Keys and values of the tokens already seen, one slot per depth.

use candle_core::Tensor;

use crate::error::{Error, Result};

/// What a decoder remembers of the tokens it has read: keys and values at every depth.
///
/// Blocks that share weights still have a slot each: what they see differs. Made by
/// [`Decoder::cache`](super::Decoder::cache), filled by [`Decoder::extend`](super::Decoder::extend).
#[derive(Debug)]
pub struct KvCache {
    slots: Vec<Slot>,
    len: usize,
}

/// Room for tokens grows by at least this many.
const GROWTH: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Slot {
    /// Keys and values, `(batch, capacity, kv_heads · head_dim)`; `len` positions are filled.
    buffers: Option<(Tensor, Tensor)>,
    len: usize,
}

impl KvCache {
    pub(super) fn new(depth: usize) -> Self {
        Self { slots: (0..depth).map(|_| Slot::default()).collect(), len: 0 }
    }

    /// How many tokens are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of the keys and values of one token of each text of the batch, at all depths; 0 while empty.
    #[must_use]
    pub fn bytes_per_token(&self) -> usize {
        let buffers = self.slots.iter().filter(|slot| slot.len > 0).filter_map(|slot| slot.buffers.as_ref());
        let row = |tensor: &Tensor| {
            tensor.dims().last().copied().unwrap_or_default() * tensor.dtype().size_in_bytes()
        };
        buffers.map(|(keys, values)| row(keys) + row(values)).sum()
    }

    /// Forgets every token from position `len` on; keeps all where there are no more than `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for slot in &mut self.slots {
            slot.len = slot.len.min(len);
        }
    }

    /// The same tokens as each of `texts` has seen them, which go on differently, with room for so many more.
    /// The cache must be that of one text, or empty.
    pub(crate) fn repeated(&self, texts: usize, more: usize) -> Result<Self> {
        let slots = self.slots.iter().map(|slot| slot.repeated(texts, more)).collect::<Result<_>>()?;
        Ok(Self { slots, len: self.len })
    }

    pub(super) fn depth(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn slot(&mut self, depth: usize) -> Result<&mut Slot> {
        let slots = self.slots.len();
        self.slots.get_mut(depth).ok_or(Error::NoSuchBlock { index: depth, depth: slots })
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

impl Slot {
    fn repeated(&self, texts: usize, more: usize) -> Result<Self> {
        let Some((keys, values)) = self.buffers.as_ref().filter(|_| self.len > 0) else {
            return Ok(Self::default());
        };
        let repeat = |buffer: &Tensor| -> Result<Tensor> {
            let (_, _, width) = buffer.dims3()?;
            let room = Tensor::zeros((texts, self.len + more, width), buffer.dtype(), buffer.device())?;
            let seen = buffer.narrow(1, 0, self.len)?.broadcast_as((texts, self.len, width))?;
            room.slice_set(&seen.contiguous()?, 1, 0)?;
            Ok(room)
        };
        Ok(Self { buffers: Some((repeat(keys)?, repeat(values)?)), len: self.len })
    }

    /// Adds `(batch, seq, width)` keys and values; returns all there are, `(batch, len, width)`.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, seq, width) = k.dims3()?;
        let len = self.len + seq;
        // Before anything is taken apart: after an error the slot is as it was.
        if let Some((keys, _)) = self.buffers.as_ref().filter(|_| self.len > 0) {
            let (cached_batch, _, cached_width) = keys.dims3()?;
            if (cached_batch, cached_width) != (batch, width) || keys.dtype() != k.dtype() {
                let found = format!("({batch}, {width}) of {:?}", k.dtype());
                let expected = format!("({cached_batch}, {cached_width}) of {:?} as cached", keys.dtype());
                return Err(Error::argument("batch and width", found, expected));
            }
        }
        let fits = |keys: &Tensor| matches!(keys.dims3(), Ok((b, room, w)) if (b, w) == (batch, width) && room >= len);
        let buffers = match self.buffers.take() {
            Some((keys, values)) if fits(&keys) && keys.dtype() == k.dtype() => (keys, values),
            filled => {
                let capacity = (2 * self.len).max(len).next_multiple_of(GROWTH);
                let grow = |old: Option<&Tensor>| -> Result<Tensor> {
                    let buffer = Tensor::zeros((batch, capacity, width), k.dtype(), k.device())?;
                    if let Some(old) = old.filter(|_| self.len > 0) {
                        buffer.slice_set(&old.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
                    }
                    Ok(buffer)
                };
                (grow(filled.as_ref().map(|b| &b.0))?, grow(filled.as_ref().map(|b| &b.1))?)
            }
        };
        buffers.0.slice_set(&k.detach().contiguous()?, 1, self.len)?;
        buffers.1.slice_set(&v.detach().contiguous()?, 1, self.len)?;
        let (keys, values) = self.buffers.insert(buffers);
        self.len = len;
        Ok((keys.narrow(1, 0, len)?, values.narrow(1, 0, len)?))
    }
}
