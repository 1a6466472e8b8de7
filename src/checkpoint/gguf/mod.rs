//! A GGUF file seen as a Hugging Face checkpoint: its config, its tensors by their names, its tokenizer.

mod config;
mod metadata;
mod names;
mod tokenizer;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use candle_core::{Device, Tensor};
use tokenizers::Tokenizer;

use crate::error::{Error, Result, without_backtrace};
use metadata::Metadata;
use names::{Architecture, Layout, is_rope_table};

/// A GGUF file whose header has been read and checked; tensors are read on demand.
pub(crate) struct GgufFile {
    path: PathBuf,
    architecture: Architecture,
    content: Content,
    entries: Vec<Entry>,
}

/// One tensor of the checkpoint.
struct Entry {
    /// The Hugging Face name.
    name: String,
    /// The name in the file.
    stored: String,
    /// The Hugging Face shape.
    shape: Vec<usize>,
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufFile")
            .field("path", &self.path)
            .field("architecture", &self.architecture)
            .field("tensors", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl GgufFile {
    /// Reads the header and checks every tensor's place against the file's length; no tensor is read.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let content = Content::read(&mut HeaderReader::new(BufReader::new(file))).map_err(|error| {
            Error::format(path, format!("not a readable gguf header: {}", without_backtrace(error)))
        })?;
        let name = Metadata::new(path, &content.metadata).require::<&str>("general.architecture")?;
        let architecture = Architecture::parse(name)?;

        let mut placed = Vec::with_capacity(content.tensor_infos.len());
        for (stored, info) in &content.tensor_infos {
            check_place(info, content.tensor_data_offset, length)
                .map_err(|reason| Error::tensor(path, stored, reason))?;
            if is_rope_table(stored) {
                continue;
            }
            let name = architecture.hugging_face_name(stored).ok_or_else(|| {
                Error::tensor(path, stored, format!("unknown, expected a tensor of `{}`", architecture.key()))
            })?;
            let mut shape = info.shape.dims().to_vec();
            if architecture.layout(stored) == Layout::Transposed {
                shape.reverse();
            }
            placed.push((info.offset, Entry { name, stored: stored.clone(), shape }));
        }
        placed.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| x.name.cmp(&y.name)));
        let entries = placed.into_iter().map(|(_, entry)| entry).collect();
        Ok(Self { path: path.to_path_buf(), architecture, content, entries })
    }

    /// The equivalent `config.json`.
    pub(crate) fn config(&self) -> Result<serde_json::Value> {
        config::config(self)
    }

    /// Every tensor's Hugging Face name and shape, in the file's order.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.entries.iter().map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    /// The tensor of that Hugging Face name: dequantised to f32 on the CPU, in Hugging Face's layout.
    pub(crate) fn read(&self, name: &str) -> Result<Tensor> {
        let entry = self
            .entries
            .iter()
            .find(|entry| entry.name == name)
            .ok_or_else(|| Error::tensor(&self.path, name, "missing"))?;
        let tensor = self.dequantised(&entry.stored)?;
        let heads = |key: &str| self.metadata().get::<usize>(&format!("{}.{key}", self.architecture.key()));
        match self.architecture.layout(&entry.stored) {
            Layout::Same => Ok(tensor),
            Layout::PlusOne => Ok((tensor - 1.0)?),
            Layout::Transposed => Ok(tensor.t()?.contiguous()?),
            Layout::InterleavedQuery => self.deinterleaved(&tensor, entry, heads("attention.head_count")?),
            Layout::InterleavedKey => {
                let heads = heads("attention.head_count_kv")?
                    .map_or_else(|| heads("attention.head_count"), |heads| Ok(Some(heads)))?;
                self.deinterleaved(&tensor, entry, heads)
            }
        }
    }

    /// The tokenizer built from the file's vocabulary.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        tokenizer::tokenizer(self.metadata(), self.architecture)
    }

    /// The `tokenizer_config.json` that lets transformers load the tokenizer's `tokenizer.json`.
    pub(crate) fn tokenizer_config(&self) -> serde_json::Value {
        tokenizer::tokenizer_config(self.metadata(), self.architecture)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn architecture(&self) -> Architecture {
        self.architecture
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata::new(&self.path, &self.content.metadata)
    }

    /// The shape of the tensor under its name in the file, `None` where there is none.
    pub(super) fn stored_shape(&self, stored: &str) -> Option<&[usize]> {
        self.content.tensor_infos.get(stored).map(|info| info.shape.dims())
    }

    /// The numbers of a tensor under its name in the file, `None` where there is none.
    pub(super) fn stored_values(&self, stored: &str) -> Result<Option<Vec<f32>>> {
        if !self.content.tensor_infos.contains_key(stored) {
            return Ok(None);
        }
        Ok(Some(self.dequantised(stored)?.flatten_all()?.to_vec1()?))
    }

    /// The tensor under its name in the file, as f32 on the CPU, in the file's layout.
    fn dequantised(&self, stored: &str) -> Result<Tensor> {
        let mut file = File::open(&self.path).map_err(Error::io("read", &self.path))?;
        self.content
            .tensor(&mut file, stored, &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .map_err(|error| Error::tensor(&self.path, stored, without_backtrace(error).to_string()))
    }

    /// Puts each head's rows, stored as pairs (i, i + d/2), back into their order: (heads·d, ..) → (heads·d, ..).
    fn deinterleaved(&self, tensor: &Tensor, entry: &Entry, heads: Option<usize>) -> Result<Tensor> {
        let rows = entry.shape.first().copied().unwrap_or_default();
        let heads = heads.unwrap_or_default();
        if heads == 0 || !rows.is_multiple_of(heads.saturating_mul(2)) {
            let reason = format!("has {rows} rows, expected a multiple of twice the {heads} heads");
            return Err(Error::tensor(&self.path, &entry.stored, reason));
        }
        let pairs = tensor.reshape((heads, rows / heads / 2, 2, ()))?;
        Ok(pairs.transpose(1, 2)?.contiguous()?.reshape(entry.shape.as_slice())?)
    }
}

/// Whether the tensor's bytes lie within a file of that length, without computing anything that can overflow.
fn check_place(info: &TensorInfo, data: u64, length: u64) -> Result<(), String> {
    let dims = info.shape.dims();
    let dtype = info.ggml_dtype;
    if matches!(dtype, GgmlDType::Q8_1 | GgmlDType::Q8K) {
        return Err(format!("is stored as {dtype:?}, which is for activations, expected a weight's type"));
    }
    let row = dims.last().copied().unwrap_or(1);
    if dims.contains(&0) || !row.is_multiple_of(dtype.block_size()) {
        let block = dtype.block_size();
        return Err(format!(
            "has shape {dims:?}, expected rows of a positive multiple of {block} for {dtype:?}"
        ));
    }
    let bytes = dims
        .iter()
        .try_fold(1_usize, |count, &dim| count.checked_mul(dim))
        .and_then(|count| (count / dtype.block_size()).checked_mul(dtype.type_size()))
        .and_then(|bytes| u64::try_from(bytes).ok());
    let end = bytes.and_then(|bytes| data.checked_add(info.offset)?.checked_add(bytes));
    match end {
        Some(end) if end <= length => Ok(()),
        Some(end) => Err(format!("ends at byte {end}, but the file ends at byte {length}")),
        None => Err(format!("has shape {dims:?} at offset {}, more than any file holds", info.offset)),
    }
}

/// The longest header accepted: three times the largest vocabularies in use, times thirty-two in memory.
const LONGEST_HEADER: u64 = 64 << 20;

/// Passes a header through to candle's parser, and stops what that parser would not survive: a
/// `general.alignment` of 0, which it divides by, and metadata without end, which it keeps.
struct HeaderReader<R> {
    inner: R,
    read: u64,
    alignment: Watch,
}

/// How much of the alignment's entry has passed.
enum Watch {
    Key,
    Type,
    Value,
}

impl<R> HeaderReader<R> {
    fn new(inner: R) -> Self {
        Self { inner, read: 0, alignment: Watch::Key }
    }
}

impl<R: Read> Read for HeaderReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }

    /// The parser asks for one field at a time through this method.
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.read = self.read.saturating_add(buffer.len() as u64);
        if self.read > LONGEST_HEADER {
            return Err(io::Error::other(format!("header is longer than {LONGEST_HEADER} bytes")));
        }
        self.inner.read_exact(buffer)?;
        self.alignment = match self.alignment {
            _ if buffer
                .strip_prefix(b"general.alignment")
                .is_some_and(|rest| rest.iter().all(|&b| b == 0)) =>
            {
                Watch::Type
            }
            Watch::Type if buffer.len() == 4 => Watch::Value,
            Watch::Value if buffer.iter().all(|&byte| byte == 0) => {
                return Err(io::Error::other("`general.alignment` is 0, expected a power of two"));
            }
            _ => Watch::Key,
        };
        Ok(())
    }
}

impl<R: Seek> Seek for HeaderReader<R> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.inner.seek(position)
    }

    /// As the inner reader does it: the default would empty a buffered reader's buffer.
    fn stream_position(&mut self) -> io::Result<u64> {
        self.inner.stream_position()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(super) mod tests {
    use std::fs;

    use candle_core::DType;
    use candle_core::quantized::QTensor;
    use candle_core::quantized::gguf_file::{Value, write};

    use super::*;

    /// Writes a GGUF file of f32 tensors.
    pub(in crate::checkpoint) fn written(
        directory: &Path,
        metadata: &[(&str, Value)],
        tensors: &[(&str, Tensor)],
    ) -> PathBuf {
        let path = directory.join("model.gguf");
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let stored: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (*name, QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
            .collect();
        let stored: Vec<_> = stored.iter().map(|(name, tensor)| (*name, tensor)).collect();
        write(&mut File::create(&path).unwrap(), &metadata, &stored).unwrap();
        path
    }

    pub(in crate::checkpoint) fn text(value: &str) -> Value {
        Value::String(value.to_owned())
    }

    pub(in crate::checkpoint) fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0_f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn assert_same(a: &Tensor, b: &Tensor) {
        assert_eq!(a.dims(), b.dims());
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(difference.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap() < 1e-6);
    }

    /// As llama.cpp's converter permutes the rows of q and k: the halves of a head become pairs.
    fn interleaved(tensor: &Tensor, heads: usize) -> Tensor {
        let rows = tensor.dims()[0];
        let halves = tensor.reshape((heads, 2, rows / heads / 2, ())).unwrap();
        halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(tensor.dims()).unwrap()
    }

    fn llama_metadata() -> Vec<(&'static str, Value)> {
        vec![
            ("general.architecture", text("llama")),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
        ]
    }

    #[test]
    fn llama_rows_are_put_back() {
        let (q, k, v, bias) = (random(&[48, 32]), random(&[24, 32]), random(&[24, 32]), random(&[48]));
        let stored = [
            ("blk.0.attn_q.weight", interleaved(&q, 4)),
            ("blk.0.attn_k.weight", interleaved(&k, 2)),
            ("blk.0.attn_v.weight", v.clone()),
            ("blk.0.attn_q.bias", interleaved(&bias, 4)),
        ];
        let directory = tempfile::tempdir().unwrap();
        let file = GgufFile::open(&written(directory.path(), &llama_metadata(), &stored)).unwrap();
        for (part, expected) in
            [("q_proj.weight", &q), ("k_proj.weight", &k), ("v_proj.weight", &v), ("q_proj.bias", &bias)]
        {
            assert_same(&file.read(&format!("model.layers.0.self_attn.{part}")).unwrap(), expected);
        }
        assert_eq!(file.tensors()[1], ("model.layers.0.self_attn.k_proj.weight".to_owned(), vec![24, 32]));
        assert!(file.read("model.norm.weight").unwrap_err().to_string().contains("missing"));
    }

    #[test]
    fn gemma_norms_lose_their_one() {
        for architecture in ["gemma", "gemma2", "gemma3"] {
            let (norm, up) = (random(&[32]), random(&[8, 32]));
            let stored = [
                ("blk.0.attn_norm.weight", (&norm + 1.0).unwrap()),
                ("blk.0.attn_q_norm.weight", (&norm + 1.0).unwrap()),
                ("output_norm.weight", (&norm + 1.0).unwrap()),
                ("blk.0.ffn_up.weight", up.clone()),
            ];
            let metadata = [("general.architecture", text(architecture))];
            let directory = tempfile::tempdir().unwrap();
            let file = GgufFile::open(&written(directory.path(), &metadata, &stored)).unwrap();
            for name in ["model.layers.0.input_layernorm", "model.layers.0.self_attn.q_norm", "model.norm"] {
                assert_same(&file.read(&format!("{name}.weight")).unwrap(), &norm);
            }
            assert_same(&file.read("model.layers.0.mlp.up_proj.weight").unwrap(), &up);
        }
    }

    #[test]
    fn gpt2_projections_are_transposed() {
        let (weight, bias) = (random(&[32, 96]), random(&[96]));
        let stored = [
            ("blk.0.attn_qkv.weight", weight.t().unwrap().contiguous().unwrap()),
            ("blk.0.attn_qkv.bias", bias.clone()),
        ];
        let metadata = [("general.architecture", text("gpt2"))];
        let directory = tempfile::tempdir().unwrap();
        let file = GgufFile::open(&written(directory.path(), &metadata, &stored)).unwrap();
        assert!(file.tensors().contains(&("transformer.h.0.attn.c_attn.weight".to_owned(), vec![32, 96])));
        assert_same(&file.read("transformer.h.0.attn.c_attn.weight").unwrap(), &weight);
        assert_same(&file.read("transformer.h.0.attn.c_attn.bias").unwrap(), &bias);
    }

    #[test]
    fn quantised_tensors_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let weight = random(&[4, 64]);
        let quantised = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
        let metadata = text("qwen3");
        let mut writer = File::create(&path).unwrap();
        write(&mut writer, &[("general.architecture", &metadata)], &[("output.weight", &quantised)]).unwrap();
        let read = GgufFile::open(&path).unwrap().read("lm_head.weight").unwrap();
        assert_eq!(read.dtype(), DType::F32);
        assert_same(&read, &quantised.dequantize(&Device::Cpu).unwrap());
    }

    #[test]
    fn a_truncated_file_is_an_error_at_every_length() {
        let directory = tempfile::tempdir().unwrap();
        let stored = [("blk.0.attn_v.weight", random(&[8, 32])), ("output_norm.weight", random(&[32]))];
        let path = written(directory.path(), &llama_metadata(), &stored);
        let whole = fs::read(&path).unwrap();
        GgufFile::open(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = GgufFile::open(&path).unwrap_err();
            assert!(matches!(error, Error::Format { .. } | Error::Tensor { .. }), "{length}: {error}");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let message = GgufFile::open(&path).unwrap_err().to_string();
        assert!(
            message.contains("output_norm.weight") && message.contains("the file ends at byte"),
            "{message}"
        );
    }

    /// The bytes of a version 3 file: one metadata entry beside the architecture, one tensor, no data.
    fn hostile(counts: (u64, u64), alignment: u32, dims: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
        let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let mut bytes = [b"GGUF".as_slice(), &3_u32.to_le_bytes()].concat();
        bytes.extend([counts.0.to_le_bytes(), counts.1.to_le_bytes()].concat());
        bytes.extend([string("general.alignment"), 4_u32.to_le_bytes().to_vec()].concat());
        bytes.extend(alignment.to_le_bytes());
        bytes
            .extend([string("general.architecture"), 8_u32.to_le_bytes().to_vec(), string("llama")].concat());
        bytes.extend([string("output.weight"), (dims.len() as u32).to_le_bytes().to_vec()].concat());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend([&dtype.to_le_bytes()[..], &offset.to_le_bytes(), &[0; 64]].concat());
        bytes
    }

    #[test]
    fn hostile_headers_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let open = |bytes: Vec<u8>| {
            fs::write(&path, bytes).unwrap();
            GgufFile::open(&path)
        };
        open(hostile((1, 2), 32, &[4], 0, 0)).unwrap();
        for (bytes, expected) in [
            (hostile((u64::MAX, 2), 32, &[4], 0, 0), "tensor_count"),
            (hostile((1 << 20, 2), 32, &[4], 0, 0), "tensors"),
            (hostile((1, u64::MAX), 32, &[4], 0, 0), "metadata_kv_count"),
            (hostile((1, 2), 0, &[4], 0, 0), "general.alignment"),
            (hostile((1, 2), 32, &[1 << 40], 0, 0), "ends at byte"),
            (hostile((1, 2), 32, &[u64::MAX, u64::MAX], 0, 0), "more than any file holds"),
            (hostile((1, 2), 32, &[4], 0, u64::MAX - 8), "more than any file holds"),
            (hostile((1, 2), 32, &[4], 0, 1 << 30), "ends at byte"),
            (hostile((1, 2), 32, &[5], 8, 0), "multiple of 32"),
            (hostile((1, 2), 32, &[0], 0, 0), "positive"),
            (hostile((1, 2), 32, &[256], 15, 0), "activations"),
            (hostile((1, 2), 32, &[4; 5], 0, 0), "5 dimensions"),
            (hostile((1, 2), 32, &[4], 99, 0), "dtype"),
            (b"GGUX".to_vec(), "magic"),
        ] {
            let message = open(bytes).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("model.gguf"), "{expected}: {message}");
        }
    }

    #[test]
    fn a_tensor_without_a_place_in_the_architecture_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let stored = [("blk.0.ffn_gate_inp.weight", random(&[4, 32]))];
        let error = GgufFile::open(&written(directory.path(), &llama_metadata(), &stored)).unwrap_err();
        assert!(error.to_string().contains("ffn_gate_inp"), "{error}");
    }
}
