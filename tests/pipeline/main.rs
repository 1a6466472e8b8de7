//! The whole job by a recipe: what it makes, what it forecasts, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../compressions/mod.rs"]
mod compressions;
mod dry_runs;
mod recipes;
mod runs;
mod targets;
