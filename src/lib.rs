#![doc = include_str!("../README.md")]

mod account;
pub mod checkpoint;
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
pub use eval::{Perplexity, perplexity};
pub use fold::{OutputError, fold, fold_on, output_errors};
pub use generate::Generate;
pub use heal::Heal;
pub use importance::{Importance, Scores};
pub use mix::{Candidate, Mix, pareto_front, search_mixes};
pub use model::{Architecture, Decoder, KvCache};
pub use pipeline::{Compressor, Recipe};
pub use plan::{PLAN_VERSION, Plan, PlanBuilder, Target};
pub use progress::Observer;
