//! Healing.
mod adamw;
mod schedule;
pub use adamw::AdamW;
pub use schedule::{Decay, Schedule};
