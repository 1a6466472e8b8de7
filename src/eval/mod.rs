//! What a model is worth, by protocols that results state.

mod choices;
mod perplexity;
mod task;

pub use choices::{Accuracy, accuracy};
pub use perplexity::{Perplexity, perplexity, perplexity_streamed};
pub use task::{Choice, Item, Task};
