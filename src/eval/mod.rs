//! What a model is worth, by protocols that results state.

mod choices;
mod latency;
mod perplexity;
mod record;
mod task;

pub use choices::{Accuracy, Answer, accuracy, answers};
pub use latency::{Latency, LatencyOptions, Throughput, latency};
pub use perplexity::{Perplexity, perplexity, perplexity_streamed};
pub use task::{Choice, Item, Task};
