//! Parameters read from where they are stored.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::Checkpoint;
use super::layout::Stored;
use crate::error::{Error, Result};
use crate::model::Param;

/// Reads a checkpoint's parameters in any order; of tensors that hold several, each is read once.
pub(super) struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    holders: HashMap<Param, &'a Stored>,
    /// What was read together with another parameter, and not asked for yet.
    waiting: HashMap<Param, Tensor>,
    dtype: DType,
    device: &'a Device,
    /// Stored tensors read so far.
    pub(super) read: u64,
}

impl<'a> Parts<'a> {
    /// Parameters for a decoder with matrices of this type on this device.
    pub(super) fn new(checkpoint: &'a Checkpoint, dtype: DType, device: &'a Device) -> Self {
        let stored = checkpoint.tensors.iter();
        let holders = stored.flat_map(|stored| stored.params.iter().map(move |(param, _)| (*param, stored)));
        Self { checkpoint, holders: holders.collect(), waiting: HashMap::new(), dtype, device, read: 0 }
    }

    /// A parameter, rounded to what is stored or will be, and then in the type that it has in memory.
    pub(super) fn param(&mut self, param: Param) -> Result<Tensor> {
        if let Some(ready) = self.waiting.remove(&param) {
            return Ok(ready);
        }
        let checkpoint = self.checkpoint;
        let Some(stored) = self.holders.get(&param) else {
            return Err(Error::tensor(&checkpoint.location, param.to_string(), "is stored nowhere"));
        };
        let dtype = param.dtype_in_memory(self.dtype, self.device);
        let tensor = checkpoint.cast(stored, checkpoint.read(stored)?, dtype)?.to_device(self.device)?;
        self.waiting.extend(stored.split(&tensor)?);
        self.read += 1;
        self.waiting
            .remove(&param)
            .ok_or_else(|| Error::tensor(&checkpoint.location, &stored.name, "does not hold it"))
    }
}
