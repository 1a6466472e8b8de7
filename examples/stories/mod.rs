//! Small English-like stories from a seeded grammar, and a tokenizer for them: the text the embedded model learns.
//!
//! What a story says early decides words much later (who, what, where, how many, in which order), so
//! predicting it takes more than the neighbouring words. `grammar.txt` holds the plots and `words.txt` the words.

// Every example and test that includes this module uses its own part of it.
#![allow(dead_code, unreachable_pub)]

pub mod grammar;
pub mod ngram;
pub mod words;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};
use words::Facts;

/// Follows every story of a corpus; token 0 of the tokenizer.
pub const END: &str = "<|end|>";

/// A story with the facts it was told from.
#[derive(Debug, Clone)]
pub struct Tale {
    /// The name of its plot.
    pub plot: &'static str,
    /// What is true in it.
    pub facts: Facts,
    /// The story.
    pub text: String,
}

/// Draws a plot and its facts, and tells the story.
pub fn tale(rng: &mut impl Rng) -> Tale {
    let plots = grammar::plots();
    let plot = &plots[rng.random_range(0..plots.len() as u32) as usize];
    // One gets lost only where one cannot see far.
    let facts = Facts::draw(rng, plot.name == "bell");
    let text = plot.tell(rng, &facts);
    Tale { plot: plot.name, facts, text }
}

/// One story of about 90 to 150 words, in one line.
pub fn story(rng: &mut impl Rng) -> String {
    tale(rng).text
}

/// At least `min_bytes` of stories, each followed by [`END`]. The same `seed` gives the same bytes everywhere.
pub fn corpus(seed: u64, min_bytes: usize) -> String {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut text = String::with_capacity(min_bytes + 1024);
    while text.len() < min_bytes {
        text += &story(&mut rng);
        text += END;
    }
    text
}

/// Trains byte-level BPE on `corpus`, with [`END`] as token 0. It encodes any text and decodes it to the same text.
///
/// # Errors
/// When training fails.
pub fn tokenizer(corpus: &str, vocab_size: usize) -> anyhow::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build(),
    );
    tokenizer.train(&mut trainer, corpus.split(END)).map_err(anyhow::Error::msg)?;
    Ok(tokenizer)
}
