//! A `tokenizers::Tokenizer` from the vocabulary that a GGUF file keeps in its metadata.

use serde_json::{Value, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizerSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::metadata::{FromValue, Metadata};
use super::names::Architecture;
use crate::error::{Error, Result};

/// Builds the tokenizer of the kind that `tokenizer.ggml.model` names.
pub(super) fn tokenizer(metadata: Metadata<'_>, architecture: Architecture) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(metadata)?;
    let (mut tokenizer, begins) = match metadata.require("tokenizer.ggml.model")? {
        "gpt2" => {
            let pre = PreTokenizer::parse(metadata, architecture)?;
            (byte_level(&vocabulary, pre)?, pre == PreTokenizer::Llama3)
        }
        "llama" => (sentence_piece(&vocabulary)?, true),
        other => {
            let reason = format!("`tokenizer.ggml.model` is `{other}`, expected `gpt2` or `llama`");
            return Err(Error::Tokenizer(reason));
        }
    };
    add_tokens(&mut tokenizer, &vocabulary)?;
    add_template(&mut tokenizer, &vocabulary, begins)?;
    Ok(tokenizer)
}

/// The fields of `tokenizer_config.json`; what the metadata lacks or garbles is left out or null.
pub(super) fn tokenizer_config(metadata: Metadata<'_>, architecture: Architecture) -> Value {
    fn read<'a, T: FromValue<'a>>(metadata: Metadata<'a>, key: &str) -> Option<T> {
        metadata.get(key).ok().flatten()
    }
    let tokens: Vec<&str> = read(metadata, "tokenizer.ggml.tokens").unwrap_or_default();
    let token = |key: &str| read::<usize>(metadata, key).and_then(|id| tokens.get(id).copied());
    let kind: Option<&str> = read(metadata, "tokenizer.ggml.model");
    let begins = kind == Some("llama")
        || PreTokenizer::parse(metadata, architecture).is_ok_and(|pre| pre == PreTokenizer::Llama3);
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("tokenizer.ggml.bos_token_id"),
        "eos_token": token("tokenizer.ggml.eos_token_id"),
        "unk_token": token("tokenizer.ggml.unknown_token_id"),
        "pad_token": token("tokenizer.ggml.padding_token_id"),
        "add_bos_token": read(metadata, "tokenizer.ggml.add_bos_token").unwrap_or(begins),
        "clean_up_tokenization_spaces": false,
        // Without it transformers hands on token types that no decoder takes.
        "model_input_names": ["input_ids", "attention_mask"],
    });
    let length: Option<usize> = read(metadata, &format!("{}.context_length", architecture.key()));
    let template: Option<&str> = read(metadata, "tokenizer.chat_template");
    if let Some(fields) = config.as_object_mut() {
        fields.extend(length.map(|length| ("model_max_length".to_owned(), length.into())));
        fields.extend(template.map(|template| ("chat_template".to_owned(), template.into())));
    }
    config
}

/// llama.cpp's kinds of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn parse(number: usize) -> Result<Self> {
        Ok(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => {
                let reason = format!("`tokenizer.ggml.token_type` holds {number}, expected 1 to 6");
                return Err(Error::Tokenizer(reason));
            }
        })
    }
}

/// Every token's text and kind, by id.
struct Vocabulary<'a> {
    metadata: Metadata<'a>,
    tokens: Vec<(&'a str, Kind)>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: Metadata<'a>) -> Result<Self> {
        let texts: Vec<&str> = metadata.require("tokenizer.ggml.tokens")?;
        let kinds = match metadata.get::<Vec<usize>>("tokenizer.ggml.token_type")? {
            Some(numbers) => numbers.into_iter().map(Kind::parse).collect::<Result<Vec<_>>>()?,
            None => vec![Kind::Normal; texts.len()],
        };
        if kinds.len() != texts.len() {
            return Err(length_error("tokenizer.ggml.token_type", kinds.len(), texts.len()));
        }
        let mut tokens: Vec<_> = texts.into_iter().zip(kinds).collect();
        // Files without kinds still have to keep their first and last token whole.
        for key in ["bos_token_id", "eos_token_id"] {
            let id = metadata.get::<usize>(&format!("tokenizer.ggml.{key}"))?;
            if let Some((_, kind)) = id.and_then(|id| tokens.get_mut(id))
                && *kind == Kind::Normal
            {
                *kind = Kind::Control;
            }
        }
        Ok(Self { metadata, tokens })
    }

    /// The ids by text; of two tokens with one text, the first.
    fn ids(&self, text: impl Fn(&str, Kind) -> String) -> Vocab {
        let mut ids = Vocab::default();
        for (id, &(token, kind)) in (0..).zip(&self.tokens) {
            ids.entry(text(token, kind)).or_insert(id);
        }
        ids
    }

    /// The id and text of the token that the metadata names under `key`.
    fn named(&self, key: &str) -> Result<Option<(usize, &'a str)>> {
        let key = format!("tokenizer.ggml.{key}");
        let Some(id) = self.metadata.get::<usize>(&key)? else { return Ok(None) };
        let Some((text, _)) = self.tokens.get(id) else {
            let reason = format!("`{key}` is {id}, but there are {} tokens", self.tokens.len());
            return Err(Error::Tokenizer(reason));
        };
        Ok(Some((id, text)))
    }
}

/// How a byte-level tokenizer cuts a text into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    Gpt2,
    SmolLm,
    Qwen2,
    Llama3,
    Dbrx,
}

/// The words of GPT-4's tokenizer and of those made after it, with `\p{N}{1,3}` for the digits.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    fn parse(metadata: Metadata<'_>, architecture: Architecture) -> Result<Self> {
        match (metadata.get("tokenizer.ggml.pre")?, architecture) {
            // Elsewhere llama.cpp's default is a set of expressions that no Hugging Face tokenizer has.
            (Some("gpt-2"), _) | (Some("default") | None, Architecture::Gpt2) => Ok(Self::Gpt2),
            (Some("smollm"), _) => Ok(Self::SmolLm),
            (Some("qwen2"), _) => Ok(Self::Qwen2),
            (Some("llama-bpe" | "llama3" | "llama-v3"), _) => Ok(Self::Llama3),
            // OLMo 2's.
            (Some("dbrx"), _) => Ok(Self::Dbrx),
            (other, _) => Err(Error::Tokenizer(format!(
                "`tokenizer.ggml.pre` is `{}`, expected one of gpt-2, smollm, qwen2, llama-bpe, dbrx",
                other.unwrap_or("missing")
            ))),
        }
    }

    /// The steps before the merges: cutting into words, and then bytes as printable characters.
    fn steps(self) -> Result<Vec<PreTokenizerWrapper>> {
        let bytes = |trim_offsets, cut| ByteLevel::new(false, trim_offsets, cut).into();
        let split = |pattern: String| -> Result<PreTokenizerWrapper> {
            let pattern = SplitPattern::Regex(pattern);
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            Ok(split.map_err(tokenizer_error)?.into())
        };
        Ok(match self {
            Self::Gpt2 => vec![bytes(true, true)],
            Self::SmolLm => vec![Digits::new(true).into(), bytes(true, true)],
            Self::Qwen2 => vec![split(WORDS.replace(r"\p{N}{1,3}", r"\p{N}"))?, bytes(false, false)],
            Self::Llama3 | Self::Dbrx => vec![split(WORDS.to_owned())?, bytes(true, false)],
        })
    }
}

/// GPT-2's kind: merges over the bytes of words.
fn byte_level(vocabulary: &Vocabulary<'_>, pre: PreTokenizer) -> Result<Tokenizer> {
    let ids = vocabulary.ids(|token, _| token.to_owned());
    let lines: Vec<&str> = vocabulary.metadata.require("tokenizer.ggml.merges")?;
    let mut merges = Merges::with_capacity(lines.len());
    for line in lines {
        let pair = line.split_once(' ').filter(|(left, right)| {
            // A merge into something that is no token makes the builder write beyond its buffer.
            ids.contains_key(&format!("{left}{right}"))
        });
        let Some((left, right)) = pair else {
            let reason = format!("merge `{line}`, expected two tokens that together are a token");
            return Err(Error::Tokenizer(reason));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre == PreTokenizer::Llama3)
        .build()
        .map_err(tokenizer_error)?;
    let mut tokenizer = Tokenizer::new(model);
    if pre == PreTokenizer::Qwen2 {
        tokenizer.with_normalizer(Some(NFC)).map_err(tokenizer_error)?;
    }
    tokenizer.with_pre_tokenizer(Some(PreTokenizerSequence::new(pre.steps()?)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// `SentencePiece`'s kind: merges over characters, with bytes for those that are no token.
fn sentence_piece(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let ids = vocabulary.ids(piece);
    let merges = merges_by_score(vocabulary, &ids)?;
    let mut builder = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    if let Some((_, unknown)) = vocabulary.named("unknown_token_id")? {
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(tokenizer_error)?);
    let spaces = Replace::new(" ", "▁").map_err(tokenizer_error)?;
    let mut decoders = vec![
        Replace::new("▁", " ").map_err(tokenizer_error)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if adds_space(vocabulary)? {
        let steps = vec![Prepend::new("▁".to_owned()).into(), spaces.into()];
        tokenizer.with_normalizer(Some(NormalizerSequence::new(steps))).map_err(tokenizer_error)?;
        decoders.push(Strip::new(' ', 1, 0).into());
    } else {
        tokenizer.with_normalizer(Some(spaces)).map_err(tokenizer_error)?;
    }
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(tokenizer)
}

/// Whether a text is read as if a space stood before it: Llama's way, which Gemma's files switch off.
fn adds_space(vocabulary: &Vocabulary<'_>) -> Result<bool> {
    Ok(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix")?.unwrap_or(true))
}

/// A token's text as `SentencePiece` has it: llama.cpp's converter writes user-defined runs of `▁` as spaces.
fn piece(token: &str, kind: Kind) -> String {
    if kind == Kind::UserDefined { token.replace(' ', "▁") } else { token.to_owned() }
}

/// The most characters in a token that merges are looked for in, which takes time quadratic in them:
/// `SentencePiece` makes tokens of at most 16 unless it is told otherwise.
const LONGEST_PIECE: usize = 256;

/// The merges that make each normal token of two others, the best score first, as transformers orders them.
///
/// A normal token of more than [`LONGEST_PIECE`] characters is an error.
fn merges_by_score(vocabulary: &Vocabulary<'_>, ids: &Vocab) -> Result<Merges> {
    let scores: Vec<f32> = vocabulary.metadata.require("tokenizer.ggml.scores")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(length_error("tokenizer.ggml.scores", scores.len(), vocabulary.tokens.len()));
    }
    let mut ranked = Vec::new();
    for (id, (&(token, kind), &score)) in vocabulary.tokens.iter().zip(&scores).enumerate() {
        if kind != Kind::Normal {
            continue;
        }
        let length = token.chars().count();
        if length > LONGEST_PIECE {
            let reason = format!("token {id} has {length} characters, expected at most {LONGEST_PIECE}");
            return Err(Error::Tokenizer(reason));
        }
        for (characters, (split, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(split);
            if ids.contains_key(left) && ids.contains_key(right) {
                ranked.push((score, characters, length - characters, left, right));
            }
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    Ok(ranked.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// Makes control tokens special, and has user-defined ones taken whole from the text.
fn add_tokens(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary<'_>) -> Result<()> {
    let characters = tokenizer.get_pre_tokenizer().is_none();
    // A prepended space would come before every added token too, were it matched in the normalised text.
    let normalised = characters && !adds_space(vocabulary)?;
    let mut special = Vec::new();
    let mut plain = Vec::new();
    for &(token, kind) in &vocabulary.tokens {
        match kind {
            Kind::Control | Kind::Unknown => special.push(AddedToken::from(token, true).normalized(false)),
            Kind::UserDefined => {
                let text = if characters { piece(token, kind) } else { token.to_owned() };
                plain.push(AddedToken::from(text, false).normalized(normalised));
            }
            Kind::Normal | Kind::Unused | Kind::Byte => {}
        }
    }
    tokenizer.add_special_tokens(special).map_err(tokenizer_error)?;
    tokenizer.add_tokens(plain).map_err(tokenizer_error)?;
    Ok(())
}

/// Has every encoded text begin with BOS, and end with EOS, where the metadata wants it; `begins` where it
/// does not say.
fn add_template(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary<'_>, begins: bool) -> Result<()> {
    let wants = |key: &str| vocabulary.metadata.get::<bool>(&format!("tokenizer.ggml.{key}"));
    let ends = |wanted: Option<bool>, default: bool, key: &str| match (wanted, vocabulary.named(key)?) {
        (Some(true), None) => {
            Err(Error::Tokenizer(format!("`tokenizer.ggml.{key}` is missing, but is to be added")))
        }
        (wanted, token) => Ok(token.filter(|_| wanted.unwrap_or(default))),
    };
    let first = ends(wants("add_bos_token")?, begins, "bos_token_id")?;
    let last = ends(wants("add_eos_token")?, false, "eos_token_id")?;
    if first.is_none() && last.is_none() {
        return Ok(());
    }
    let around = |text: &str, part: usize| -> Vec<String> {
        let special = |token: Option<(usize, &str)>| token.map(|(_, token)| format!("{token}:{part}"));
        [special(first), Some(format!("{text}:{part}")), special(last)].into_iter().flatten().collect()
    };
    let mut both = around("$A", 0);
    both.extend(around("$B", 1));
    let specials: Vec<(String, u32)> =
        first.iter().chain(last.iter()).map(|&(id, token)| (token.to_owned(), id as u32)).collect();
    let template = TemplateProcessing::builder()
        .try_single(around("$A", 0))
        .map_err(Error::Tokenizer)?
        .try_pair(both)
        .map_err(Error::Tokenizer)?
        .special_tokens(specials)
        .build()
        .map_err(|error| Error::Tokenizer(error.to_string()))?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}

fn length_error(key: &str, found: usize, expected: usize) -> Error {
    Error::Tokenizer(format!("`{key}` has {found} elements, expected one for each of {expected} tokens"))
}

/// For `map_err` on the tokenizers crate's own error.
#[allow(clippy::needless_pass_by_value)]
fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use candle_core::quantized::gguf_file::Value as Stored;

    use super::*;

    fn strings(items: &[&str]) -> Stored {
        Stored::Array(items.iter().map(|item| Stored::String((*item).to_owned())).collect())
    }

    fn kinds(items: &[i32]) -> Stored {
        Stored::Array(items.iter().map(|&item| Stored::I32(item)).collect())
    }

    fn built(fields: &[(&str, Stored)]) -> Result<Tokenizer> {
        let values: HashMap<_, _> =
            fields.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value.clone())).collect();
        tokenizer(Metadata::new(Path::new("m.gguf"), &values), Architecture::Llama)
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    }

    /// A byte-level vocabulary: two special tokens, digits, and "hello" with and without a space before it.
    fn bytes(pre: &str) -> Vec<(&'static str, Stored)> {
        let tokens = [
            "<s>", "</s>", "h", "e", "l", "o", "Ġ", "1", "2", "he", "ll", "hell", "hello", "Ġhello", "12",
            "<tool>",
        ];
        let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"];
        vec![
            ("model", Stored::String("gpt2".to_owned())),
            ("pre", Stored::String(pre.to_owned())),
            ("tokens", strings(&tokens)),
            ("token_type", kinds(&[3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4])),
            ("merges", strings(&merges)),
            ("bos_token_id", Stored::U32(0)),
            ("eos_token_id", Stored::U32(1)),
        ]
    }

    #[test]
    fn byte_level_texts_come_back() {
        let text = "hello hello12<tool></s>";
        for (pre, expected) in [
            ("gpt-2", vec![12, 13, 14, 15, 1]),
            ("smollm", vec![12, 13, 7, 8, 15, 1]),
            ("qwen2", vec![12, 13, 7, 8, 15, 1]),
            ("llama-bpe", vec![0, 12, 13, 14, 15, 1]),
        ] {
            let tokenizer = built(&bytes(pre)).unwrap();
            assert_eq!(ids(&tokenizer, text), expected, "{pre}");
            assert_eq!(tokenizer.decode(&expected, true).unwrap(), "hello hello12<tool>", "{pre}");
        }
    }

    #[test]
    fn bos_is_added_where_the_metadata_says_so() {
        for (add, expected) in [(true, vec![0]), (false, vec![])] {
            let mut fields = bytes("smollm");
            fields.push(("add_bos_token", Stored::Bool(add)));
            assert_eq!(ids(&built(&fields).unwrap(), ""), expected);
        }
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_named() {
        let message = built(&bytes("tekken")).unwrap_err().to_string();
        assert!(message.contains("tokenizer.ggml.pre") && message.contains("tekken"), "{message}");
    }

    #[test]
    fn the_default_pre_tokenizer_is_known_for_gpt2_alone() {
        let values: HashMap<_, _> = bytes("default")
            .into_iter()
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
            .collect();
        let metadata = Metadata::new(Path::new("m.gguf"), &values);
        assert_eq!(ids(&tokenizer(metadata, Architecture::Gpt2).unwrap(), "hello12"), [12, 14]);
        for architecture in [Architecture::Llama, Architecture::Qwen2] {
            let message = tokenizer(metadata, architecture).unwrap_err().to_string();
            assert!(message.contains("tokenizer.ggml.pre") && message.contains("`default`"), "{message}");
        }
    }

    #[test]
    fn a_piece_of_endless_length_is_an_error() {
        let with = |length: usize| {
            let mut fields = pieces(false);
            for (key, value) in &mut fields {
                if let (&mut "tokens", Stored::Array(tokens)) = (key, value) {
                    tokens[14] = Stored::String("é".repeat(length));
                }
            }
            built(&fields)
        };
        with(LONGEST_PIECE).unwrap();
        let message = with(LONGEST_PIECE + 1).unwrap_err().to_string();
        assert!(message.contains("token 14 has 257 characters"), "{message}");
    }

    #[test]
    fn merges_and_ids_beyond_the_vocabulary_are_errors() {
        let mut fields = bytes("gpt-2");
        fields.push(("merges", strings(&["hello hello"])));
        assert!(built(&fields).unwrap_err().to_string().contains("hello hello"));
        let mut fields = bytes("gpt-2");
        fields.push(("bos_token_id", Stored::U32(99)));
        assert!(built(&fields).unwrap_err().to_string().contains("99"));
    }

    /// A `SentencePiece` vocabulary of "the", "then" and the bytes of "é", with a user-defined run of spaces.
    fn pieces(add_space: bool) -> Vec<(&'static str, Stored)> {
        let tokens = [
            "<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "  ", "▁", "t", "h", "e", "n", "th", "the", "▁the",
            "en",
        ];
        let scores = [0, 0, 0, 0, 0, 0, -5, -6, -7, -8, -9, -1, -2, -3, -4];
        vec![
            ("model", Stored::String("llama".to_owned())),
            ("tokens", strings(&tokens)),
            ("scores", Stored::Array(scores.iter().map(|&score| Stored::F32(score as f32)).collect())),
            ("token_type", kinds(&[2, 3, 3, 6, 6, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1])),
            ("bos_token_id", Stored::U32(1)),
            ("eos_token_id", Stored::U32(2)),
            ("unknown_token_id", Stored::U32(0)),
            ("add_space_prefix", Stored::Bool(add_space)),
        ]
    }

    #[test]
    fn sentence_piece_texts_come_back() {
        let text = "then theé";
        for (add_space, expected) in [(false, vec![1, 12, 10, 13, 3, 4]), (true, vec![1, 13, 10, 13, 3, 4])] {
            let tokenizer = built(&pieces(add_space)).unwrap();
            assert_eq!(ids(&tokenizer, text), expected);
            assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
            assert_eq!(ids(&tokenizer, ""), [1]);
        }
        let tokenizer = built(&pieces(false)).unwrap();
        assert_eq!(ids(&tokenizer, "the   the"), [1, 12, 5, 13]);
        assert_eq!(ids(&tokenizer, "the</s>xx"), [1, 12, 2, 0]);
    }

    #[test]
    fn lists_of_other_lengths_are_errors() {
        for key in ["scores", "token_type"] {
            let mut fields = pieces(false);
            fields.push((key, Stored::Array(vec![])));
            assert!(built(&fields).unwrap_err().to_string().contains(key));
        }
    }

    #[test]
    fn the_tokenizer_config_names_its_tokens() {
        let mut values: HashMap<_, _> =
            pieces(false).into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
        values.insert("llama.context_length".to_owned(), Stored::U32(64));
        values.insert("tokenizer.chat_template".to_owned(), Stored::String("{{ messages }}".to_owned()));
        let config = tokenizer_config(Metadata::new(Path::new("m.gguf"), &values), Architecture::Llama);
        let expected = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": null,
            "add_bos_token": true, "clean_up_tokenization_spaces": false,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 64, "chat_template": "{{ messages }}",
        });
        assert_eq!(config, expected);
    }
}
