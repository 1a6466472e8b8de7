//! One decoder for every family; what differs between families is data.

mod adapter;
mod architecture;
mod backward;
mod block;
mod cache;
mod decoder;
mod fold_map;
mod head;
mod merge;
mod params;
mod quantize;
mod residual;
mod rope;
mod share;
mod source;
mod states;
mod stored_types;
mod structure;
mod unit;

pub use adapter::{Adapter, AdapterShape, LowRank};
pub use architecture::{
    Activation, Architecture, BlockSpec, MlpKind, NormKind, NormPlacement, Positions, QkNorm, RopeScaling,
    RopeSpec,
};
pub use backward::Walk;
pub use block::{Block, BlockWeights, Norm, PerDepth};
pub use cache::KvCache;
pub use decoder::{Decoder, Pass};
pub use fold_map::{FoldMap, FoldedBlock};
pub use params::{BlockParam, NormPart, NormSite, Param, PerNormSite, PerProjection, Projection};
pub use stored_types::StoredTypes;
pub use unit::{Part, Unit};

pub(crate) use backward::{Gate, UnitGraph};
pub(crate) use source::{BlockSource, fingerprint};
pub(crate) use states::States;
