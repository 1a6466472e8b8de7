//! What a model is worth, by protocols that results state.

mod perplexity;

pub use perplexity::{Perplexity, perplexity};
