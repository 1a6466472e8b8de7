//! The tokenizer of a model, with what the model's protocol needs of it.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::ModelWrapper;

use crate::error::{Error, Result};

/// Text to token ids and back, without special tokens unless they are asked for.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
}

impl Tokenizer {
    /// Wraps a tokenizer; begin and end of text are those that `config`, a model's `config.json`, names.
    ///
    /// Whether texts begin with the begin-of-text token is the tokenizer's own rule: what it puts before an empty
    /// text.
    #[must_use]
    pub fn new(inner: tokenizers::Tokenizer, config: &Value) -> Self {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let before_nothing =
            inner.encode("", true).map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default();
        let declared = config.get("bos_token_id").and_then(id);
        let eos: Vec<u32> = match config.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            Some(value) => id(value).into_iter().collect(),
            None => Vec::new(),
        };
        // A tokenizer that only ends texts puts the end before nothing too.
        let added = before_nothing.first().copied();
        let added = added
            .filter(|first| before_nothing.len() > 1 || declared == Some(*first) || !eos.contains(first));
        Self { inner, bos: added.or(declared), eos, adds_bos: added.is_some() }
    }

    pub(crate) fn open(path: &Path, config: &Value) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::format(path, "missing, expected the model's tokenizer"));
        }
        let inner =
            tokenizers::Tokenizer::from_file(path).map_err(|error| Error::format(path, error.to_string()))?;
        Ok(Self::new(inner, config))
    }

    /// Whether special tokens that are written out in a text are read as any other characters, transformers'
    /// `split_special_tokens`; not by default, as there.
    ///
    /// The corpus wikitext, for one, writes `<unk>` for rare words. A model that has it as a special token has no use
    /// for it: what such tokens cost is next to meaningless, and can be enough to decide which blocks look cheap.
    #[must_use]
    pub fn with_split_special_tokens(mut self, split: bool) -> Self {
        self.inner.set_encode_special_tokens(split);
        self
    }

    /// Whether special tokens that are written out in a text are read as any other characters.
    #[must_use]
    pub fn splits_special_tokens(&self) -> bool {
        self.inner.get_encode_special_tokens()
    }

    /// The token for what the vocabulary does not have, where there is one.
    pub(crate) fn unknown(&self) -> Option<u32> {
        let declared = match self.inner.get_model() {
            ModelWrapper::BPE(model) => model.get_unk_token().clone(),
            _ => None,
        };
        self.inner.token_to_id(declared.as_deref().unwrap_or("<unk>"))
    }

    /// The ids of a text, without special tokens but those that it writes out.
    ///
    /// # Errors
    /// A text that the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The begin-of-text token, where there is one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a text.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Whether the model expects texts to begin with [`bos`](Self::bos).
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The tokenizer behind this one.
    #[must_use]
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// The content of a `tokenizer.json`.
    pub(crate) fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The content of a `tokenizer_config.json`.
    pub(crate) fn config(&self) -> Value {
        let token = |id: Option<u32>| id.and_then(|id| self.inner.id_to_token(id));
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token(self.bos),
            "eos_token": token(self.eos.first().copied()),
            "clean_up_tokenization_spaces": false,
            // Without it transformers passes on token types that no decoder takes.
            "model_input_names": ["input_ids", "attention_mask"],
        })
    }
}
