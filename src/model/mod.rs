//! One decoder for every family; what differs between families is data.

mod architecture;
mod backward;
mod block;
mod cache;
mod decoder;
mod params;
mod residual;
mod rope;
mod unit;

pub use architecture::{
    Activation, Architecture, BlockSpec, MlpKind, NormKind, NormPlacement, Positions, QkNorm, RopeScaling,
    RopeSpec,
};
pub use backward::Walk;
pub use block::{Block, BlockWeights, Norm, PerDepth};
pub use cache::KvCache;
pub use decoder::{Decoder, Pass};
pub use params::{BlockParam, NormPart, NormSite, Param, PerNormSite, PerProjection, Projection};
pub use unit::{Part, Unit};
