//! One decoder for every family; what differs between families is data.

mod architecture;
mod block;
mod cache;
mod decoder;
mod params;
mod rope;

pub use architecture::{
    Activation, Architecture, BlockSpec, MlpKind, NormKind, NormPlacement, Positions, QkNorm, RopeScaling,
    RopeSpec,
};
pub use block::{Block, BlockWeights, Norm, PerDepth};
pub use cache::KvCache;
pub use decoder::{Decoder, Pass};
pub use params::{BlockParam, NormPart, NormSite, Param, PerNormSite, PerProjection, Projection};
