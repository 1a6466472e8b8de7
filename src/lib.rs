// Where the README says where the documentation is on the web, the documentation has its own links: the first of two
// definitions counts.
//! [cookbook]: crate::cookbook
//! [in a service]: crate::cookbook#in-a-service
//! [own calibration text]: crate::cookbook#own-calibration-text
//! [own importance method]: crate::cookbook#own-importance-method
//! [own architecture]: crate::cookbook#own-architecture
//! [a compact checkpoint]: crate::cookbook#a-compact-checkpoint
//! [on CUDA or Metal]: crate::cookbook#on-cuda-or-metal
//! [what takes the time]: crate::cookbook#what-takes-the-time
//!
#![doc = include_str!("../README.md")]

mod account;
pub mod checkpoint;
pub mod cookbook;
pub mod data;
pub mod error;
pub mod eval;
mod file;
mod fold;
mod generate;
pub mod heal;
pub mod importance;
mod mix;
pub mod model;
pub mod ops;
pub mod pipeline;
pub mod plan;
mod progress;
pub mod report;

pub use candle_core as candle;

pub use account::{Account, Held};
pub use checkpoint::{Checkpoint, Format, HubOptions, SaveOptions, Saved};
pub use data::{Bos, Tokenizer, Windows};
pub use error::{Error, Result};
pub use eval::{Latency, LatencyOptions, Perplexity, latency, perplexity};
pub use fold::{OutputError, fold, fold_on, output_errors};
pub use generate::Generate;
pub use heal::Heal;
pub use importance::{Importance, Scores};
pub use mix::{Candidate, Mix, pareto_front, search_mixes};
pub use model::{Architecture, Decoder, KvCache};
pub use pipeline::{Compressor, Recipe};
pub use plan::{PLAN_VERSION, Plan, PlanBuilder, Target};
pub use progress::Observer;
