//! In which type each parameter of a model is stored.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::DType;

use super::architecture::Architecture;
use super::params::{BlockParam, Param};

/// In which type each parameter of a model is stored. One type for all is `DType::BF16.into()`; those of a model on disk
/// are [`Checkpoint::stored_types`](crate::Checkpoint::stored_types).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTypes {
    narrowest: DType,
    /// The types of parameters that are stored in another.
    others: Arc<HashMap<Param, DType>>,
}

impl From<DType> for StoredTypes {
    fn from(dtype: DType) -> Self {
        Self::new(dtype, [])
    }
}

impl StoredTypes {
    /// What is named has its type, all else the narrowest.
    pub(crate) fn new(narrowest: DType, types: impl IntoIterator<Item = (Param, DType)>) -> Self {
        let others = types.into_iter().filter(|(_, dtype)| *dtype != narrowest).collect();
        Self { narrowest, others: Arc::new(others) }
    }

    /// The narrowest type that a matrix is stored in: what folding makes anew is stored in that.
    #[must_use]
    pub fn narrowest(&self) -> DType {
        self.narrowest
    }

    /// The type of a parameter. What a depth adds to a matrix has the narrowest.
    #[must_use]
    pub fn of(&self, param: Param) -> DType {
        match param {
            Param::Block(_, BlockParam::Scale(_) | BlockParam::LoraA(_) | BlockParam::LoraB(_)) => {
                self.narrowest
            }
            param => self.others.get(&param).copied().unwrap_or(self.narrowest),
        }
    }

    /// The types of a model whose depths are `origins` of this one's blocks, as [`Plan::kept`](crate::Plan::kept) has
    /// them.
    #[must_use]
    pub fn of_blocks(&self, origins: &[usize]) -> Self {
        let others = self.others.iter().flat_map(|(param, dtype)| {
            let places: Vec<Param> = match *param {
                Param::Block(block, part) => {
                    let depths = origins.iter().enumerate().filter(|(_, origin)| **origin == block);
                    depths.map(|(depth, _)| Param::Block(depth, part)).collect()
                }
                other => vec![other],
            };
            places.into_iter().map(|param| (param, *dtype))
        });
        Self::new(self.narrowest, others)
    }

    /// The bytes of a parameter of this shape.
    pub(crate) fn size(&self, param: Param, shape: &[usize]) -> u64 {
        (shape.iter().product::<usize>() * self.of(param).size_in_bytes()) as u64
    }

    /// The bytes of all parameters, each shared one once.
    pub(crate) fn bytes_of(&self, arch: &Architecture) -> u64 {
        arch.params().iter().map(|(param, shape)| self.size(*param, shape)).sum()
    }
}
