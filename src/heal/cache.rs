//! A teacher's last states and likeliest tokens in a file, so that teacher and student need not be in memory together.
//!
//! The file is a magic number, the length of a JSON header as little-endian `u64`, the header, and one record a
//! window: hidden states after the last blocks, last first, in bf16; ids of the likeliest tokens as `u32`; their
//! log-probabilities and that of all other tokens together, in bf16; and the SHA-256 of the record. Records are of one
//! length, and read one by one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::losses::Losses;
use super::teacher::{Lesson, last_states};
use crate::data::{Windows, hex};
use crate::error::{Error, Result};
use crate::file;
use crate::model::Decoder;
use crate::ops::TopTokens;
use crate::progress::{self, Observer};

const MAGIC: &[u8; 8] = b"foldtch2";
const STAGE: &str = "teacher";
const CHECKSUM: usize = 32;
/// No header is longer: what claims to be is damaged.
const MAX_HEADER: u64 = 1 << 16;

/// What is kept of a teacher.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CacheOptions {
    /// States after this many last blocks; 1 by default.
    pub tail_blocks: usize,
    /// This many likeliest tokens at every position; 64 by default.
    pub top_tokens: usize,
    /// The temperature of their probabilities; that of [`Losses`] by default.
    pub temperature: f64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { tail_blocks: 1, top_tokens: 64, temperature: Losses::default().temperature }
    }
}

/// A teacher's last states and likeliest tokens on windows of text, in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherCache {
    path: PathBuf,
    header: Header,
    sizes: Sizes,
    start: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    model_sha256: String,
    windows_sha256: String,
    windows: usize,
    /// Positions of each window: all tokens but the last.
    positions: usize,
    vocab_size: usize,
    hidden_size: usize,
    depth: usize,
    /// What the matrices were held in.
    dtype: String,
    options: CacheOptions,
}

/// Bytes of a record and of its parts.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sizes {
    /// One state, and those after all of the last blocks.
    state: usize,
    tail: usize,
    ids: usize,
    /// All of it, with its checksum.
    record: usize,
}

impl Sizes {
    /// Those of a file with this header; none where numbers of a machine cannot hold them.
    fn of(header: &Header) -> Option<Self> {
        let CacheOptions { tail_blocks, top_tokens, .. } = header.options;
        let state = header.positions.checked_mul(header.hidden_size)?.checked_mul(2)?;
        let tail = state.checked_mul(tail_blocks)?;
        let ids = header.positions.checked_mul(top_tokens)?.checked_mul(4)?;
        // Log-probabilities of the tokens, and of all others together.
        let likelihoods = header.positions.checked_mul(top_tokens.checked_add(1)?)?.checked_mul(2)?;
        let record = tail.checked_add(ids)?.checked_add(likelihoods)?.checked_add(CHECKSUM)?;
        Some(Self { state, tail, ids, record })
    }
}

impl TeacherCache {
    /// Runs `teacher`, the model with this SHA-256, over all windows, and keeps what the options ask for in a file at
    /// `path`, which appears when it is whole.
    ///
    /// # Errors
    /// Options that the model cannot meet, [`Error::NotFinite`] for what the teacher says, a full disk, or a cancelling
    /// observer.
    pub fn write(
        path: impl AsRef<Path>,
        teacher: &Decoder,
        model_sha256: &str,
        windows: &Windows,
        options: &CacheOptions,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let path = path.as_ref();
        let arch = teacher.architecture();
        let header = Header {
            model_sha256: model_sha256.into(),
            windows_sha256: windows.ids_sha256(),
            windows: windows.len(),
            positions: windows.seq_len() - 1,
            vocab_size: arch.vocab_size,
            hidden_size: arch.hidden_size,
            depth: teacher.depth(),
            dtype: format!("{:?}", teacher.dtype()),
            options: *options,
        };
        check_options(&header)?;
        let too_large = || Error::format(path, "would have records that are too large");
        let sizes = Sizes::of(&header).ok_or_else(too_large)?;
        let json = serde_json::to_vec(&header).map_err(|error| Error::format(path, error.to_string()))?;
        file::replace(path, |file| {
            let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", path));
            put(MAGIC)?;
            put(&(json.len() as u64).to_le_bytes())?;
            put(&json)?;
            progress::steps(STAGE, windows.len(), observer, |index| {
                let record = record(teacher, windows, index, options)?;
                put(&record)?;
                put(&Sha256::digest(&record))
            })
        })?;
        Ok(Self { path: path.to_path_buf(), header, sizes, start: start(json.len()) })
    }

    /// Opens what [`write`](Self::write) made of the model with this SHA-256 and of these windows.
    ///
    /// # Errors
    /// A file that is damaged, or was made of another model or other windows.
    pub fn open(path: impl AsRef<Path>, model_sha256: &str, windows: &Windows) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        let mut begin = [0u8; 16];
        let damaged = |reason: &str| Error::format(path, format!("is no teacher's cache: {reason}"));
        file.read_exact(&mut begin).map_err(|_| damaged("it is too short"))?;
        let (magic, length) = begin.split_at(8);
        let length = u64::from_le_bytes(length.try_into().map_err(|_| damaged("it is too short"))?);
        if magic != MAGIC || length > MAX_HEADER {
            return Err(damaged("it begins otherwise"));
        }
        let mut json = vec![0u8; length as usize];
        file.read_exact(&mut json).map_err(|_| damaged("its header is cut off"))?;
        let header: Header = serde_json::from_slice(&json).map_err(|error| damaged(&error.to_string()))?;
        let sizes = Sizes::of(&header).filter(|sizes| sizes.state > 0);
        let sizes = sizes.ok_or_else(|| damaged("its header is of no model"))?;
        let cache = Self { path: path.to_path_buf(), header, sizes, start: start(json.len()) };
        if cache.header.model_sha256 != model_sha256 {
            let found = &cache.header.model_sha256;
            let reason = format!("is of a model with sha256 {found}, expected {model_sha256}");
            return Err(Error::format(path, reason));
        }
        cache.check_windows(windows)?;
        check_options(&cache.header)?;
        let found = file.metadata().map_err(Error::io("read", path))?.len();
        let records = (cache.header.windows as u64).checked_mul(cache.sizes.record as u64);
        let expected = records.and_then(|records| records.checked_add(cache.start));
        let expected = expected.ok_or_else(|| damaged("its header is of too many windows"))?;
        if found != expected {
            return Err(Error::format(path, format!("has {found} bytes, expected {expected}")));
        }
        Ok(cache)
    }

    fn check_windows(&self, windows: &Windows) -> Result<()> {
        let expected = windows.ids_sha256();
        if self.header.windows_sha256 == expected {
            return Ok(());
        }
        let found = &self.header.windows_sha256;
        let reason = format!(
            "is of windows with sha256 {found}, expected {expected}: of another text, or cut otherwise; delete it to have it \
             made anew"
        );
        Err(Error::format(&self.path, reason))
    }

    /// What tells it from other caches.
    pub(super) fn identity(&self) -> String {
        format!("{:?}", self.header)
    }

    /// The vocabulary, hidden size and depth of the teacher, where the cache can say what the losses ask.
    pub(super) fn check(&self, losses: &Losses, windows: &Windows) -> Result<(usize, usize, usize)> {
        self.check_windows(windows)?;
        let options = &self.header.options;
        if losses.tail_depth() > options.tail_blocks {
            let expected = format!("at most {} as in {}", options.tail_blocks, self.path.display());
            return Err(Error::argument("tail_blocks", losses.tail_blocks, expected));
        }
        if losses.divergence > 0.0 && losses.temperature.to_bits() != options.temperature.to_bits() {
            let expected = format!("{} as in {}", options.temperature, self.path.display());
            return Err(Error::argument("temperature", losses.temperature, expected));
        }
        Ok((self.header.vocab_size, self.header.hidden_size, self.header.depth))
    }

    /// What the teacher had to say of these windows; `ids` are their first tokens.
    pub(super) fn lesson(&self, losses: &Losses, windows: &[usize], ids: &Tensor) -> Result<Lesson<'static>> {
        let (header, sizes, device) = (&self.header, self.sizes, ids.device());
        let shape = (1, header.positions, header.hidden_size);
        let mut tail: Vec<Vec<Tensor>> = vec![Vec::new(); losses.tail_depth()];
        let count = header.options.top_tokens;
        let mut top = TopTokens { ids: Vec::new(), probabilities: Vec::new(), rest: Vec::new(), count };
        let mut file = File::open(&self.path).map_err(Error::io("read", &self.path))?;
        for &window in windows {
            let record = self.read(&mut file, window)?;
            let (states, rest) = record.split_at(sizes.tail);
            let (tokens, likelihoods) = rest.split_at(sizes.ids);
            for (state, bytes) in tail.iter_mut().zip(states.chunks_exact(sizes.state)) {
                let values: Vec<f32> = halves(bytes).collect();
                state.push(Tensor::from_vec(values, shape, device)?);
            }
            top.ids.extend(
                tokens
                    .chunks_exact(4)
                    .map(|id| id.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte))),
            );
            for row in halves(likelihoods).collect::<Vec<f32>>().chunks_exact(count + 1) {
                // Rounding took the sum away from 1.
                let total: f32 = row.iter().map(|log| log.exp()).sum();
                let mut probabilities = row.iter().map(|log| log.exp() / total);
                top.probabilities.extend(probabilities.by_ref().take(count));
                top.rest.extend(probabilities);
            }
        }
        let tail: candle_core::Result<Vec<Tensor>> =
            tail.iter().map(|states| Tensor::cat(states, 0)).collect();
        Ok(Lesson::new(tail?, (losses.divergence > 0.0).then_some(top)))
    }

    /// One record without its checksum, which it has to meet.
    fn read(&self, file: &mut File, window: usize) -> Result<Vec<u8>> {
        let bytes = self.sizes.record;
        let mut record = vec![0u8; bytes];
        let place = SeekFrom::Start(self.start + (window * bytes) as u64);
        let read = file.seek(place).and_then(|_| file.read_exact(&mut record));
        read.map_err(Error::io("read", &self.path))?;
        let expected = record.split_off(bytes - CHECKSUM);
        let found = Sha256::digest(&record);
        if found.as_slice() == expected {
            return Ok(record);
        }
        let (found, expected) = (hex(&found), hex(&expected));
        let reason = format!("window {window} is damaged: its sha256 is {found}, expected {expected}");
        Err(Error::format(&self.path, reason))
    }
}

/// Where records begin, after a header of this length.
fn start(header: usize) -> u64 {
    (MAGIC.len() + 8 + header) as u64
}

fn check_options(header: &Header) -> Result<()> {
    let CacheOptions { tail_blocks, top_tokens, temperature } = header.options;
    if tail_blocks > header.depth {
        return Err(Error::argument("tail_blocks", tail_blocks, format!("at most {}", header.depth)));
    }
    if !(1..=header.vocab_size).contains(&top_tokens) {
        return Err(Error::argument("top_tokens", top_tokens, format!("from 1 to {}", header.vocab_size)));
    }
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Error::argument("temperature", temperature, "a positive number"));
    }
    Ok(())
}

/// What is kept of one window.
fn record(teacher: &Decoder, windows: &Windows, index: usize, options: &CacheOptions) -> Result<Vec<u8>> {
    let window = windows.window(index)?;
    let positions = window.len() - 1;
    let ids =
        Tensor::from_slice(window.get(..positions).unwrap_or_default(), (1, positions), teacher.device())?;
    let (tail, output) = last_states(teacher, &ids, options.tail_blocks)?;
    let normalised = teacher.normalised(&output.flatten_to(1)?)?;
    let top = teacher.top_tokens(&normalised, options.top_tokens, options.temperature)?;
    let mut record = Vec::new();
    for state in tail {
        let values =
            state.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<bf16>()?;
        record.extend(values.into_iter().flat_map(bf16::to_le_bytes));
    }
    let said = top.probabilities.iter().chain(&top.rest).copied().chain(halves(&record));
    if let Some(value) = said.into_iter().find(|value| !value.is_finite()) {
        return Err(Error::NotFinite {
            what: format!("what the teacher says of window {index}"),
            value: value.into(),
        });
    }
    record.extend(top.ids.iter().flat_map(|id| id.to_le_bytes()));
    for (row, rest) in top.probabilities.chunks_exact(top.count).zip(&top.rest) {
        let logs = row.iter().chain([rest]).map(|p| bf16::from_f32(p.ln()));
        record.extend(logs.flat_map(bf16::to_le_bytes));
    }
    Ok(record)
}

/// Little-endian bf16 as f32.
fn halves(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(2).filter_map(|pair| Some(bf16::from_le_bytes(pair.try_into().ok()?).to_f32()))
}
