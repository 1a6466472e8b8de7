//! What a depth adds to a matrix that it shares.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What makes a depth's projection its own although its matrix `W` is shared: `y = s ⊙ (W x) + B (A x) + bias`.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Adapter {
    /// The factor `s` of each output, `(out)`.
    pub scale: Option<Tensor>,
    /// The low-rank residual.
    pub low_rank: Option<LowRank>,
}

/// A residual of low rank, as LoRA has it (Hu et al., 2021, arXiv 2106.09685) with its factor merged into `B`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `(rank, in)`.
    pub a: Tensor,
    /// `(out, rank)`.
    pub b: Tensor,
}

/// What an [`Adapter`] of a depth consists of, without its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterShape {
    /// Whether it scales outputs.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub scale: bool,
    /// The rank of its residual, 0 where it has none.
    #[serde(skip_serializing_if = "is_zero")]
    pub rank: usize,
    /// The earlier depth whose residual it is, where that is not its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual_of: Option<usize>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks with a reference
fn is_zero(rank: &usize) -> bool {
    *rank == 0
}

impl AdapterShape {
    /// Whether it adds nothing.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

impl Adapter {
    /// An adapter of a scale, a residual, or both.
    #[must_use]
    pub fn new(scale: Option<Tensor>, low_rank: Option<LowRank>) -> Self {
        Self { scale, low_rank }
    }

    /// What it consists of; by itself, it knows nothing of other depths.
    #[must_use]
    pub fn shape(&self) -> AdapterShape {
        let rank = self.low_rank.as_ref().and_then(|residual| residual.a.dim(0).ok());
        AdapterShape { scale: self.scale.is_some(), rank: rank.unwrap_or_default(), residual_of: None }
    }

    /// Whether its residual is the other's, and not only as large.
    pub(super) fn has_residual_of(&self, other: &Self) -> bool {
        let ids =
            |adapter: &Self| adapter.low_rank.as_ref().map(|residual| (residual.a.id(), residual.b.id()));
        self.low_rank.is_some() && ids(self) == ids(other)
    }

    /// Whether it adds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scale.is_none() && self.low_rank.is_none()
    }

    /// The one matrix that does what `weight` `(out, in)` and the adapter do together, `s ⊙ W + B A`, in f32. Without
    /// anything to merge it is `weight` as it is.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        if self.is_empty() {
            return Ok(weight.clone());
        }
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let mut merged = wide(weight)?;
        if let Some(scale) = &self.scale {
            merged = merged.broadcast_mul(&wide(scale)?.unsqueeze(1)?)?;
        }
        if let Some(residual) = &self.low_rank {
            merged = (merged + wide(&residual.b)?.matmul(&wide(&residual.a)?)?)?;
        }
        Ok(merged)
    }

    /// Fails where the tensors are not those of a projection of this `(out, in)`.
    pub(super) fn check(&self, (output, input): (usize, usize)) -> Result<()> {
        let expect = |name: &'static str, tensor: &Tensor, shape: &[usize]| {
            if tensor.dims() == shape {
                return Ok(());
            }
            Err(Error::argument(name, format!("{:?}", tensor.dims()), format!("shape {shape:?}")))
        };
        if let Some(scale) = &self.scale {
            expect("adapter scale", scale, &[output])?;
        }
        if let Some(residual) = &self.low_rank {
            let rank = self.shape().rank;
            if rank == 0 {
                return Err(Error::argument("adapter rank", 0, "at least 1"));
            }
            expect("adapter a", &residual.a, &[rank, input])?;
            expect("adapter b", &residual.b, &[output, rank])?;
        }
        Ok(())
    }
}
