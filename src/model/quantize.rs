//! Decoders whose matrices are quantised: for generating and measuring, in less memory and time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::DType;
use candle_core::quantized::{GgmlDType, QTensor};

use super::block::BlockWeights;
use super::decoder::Decoder;
use super::params::Param;
use crate::error::{Error, Result};
use crate::ops::{Matrix, MatrixId, expected_instead_of, ggml_name};
use crate::progress::{self, Observer};

const STAGE: &str = "quantize";

impl Decoder {
    /// The same decoder with its matrices quantised to Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, types of ggml: those of all
    /// blocks, the embedding, and the head where it is not tied. A tied head and its embedding stay one matrix, whose
    /// rows are dequantised when they are looked up. What depths share is quantised once and stays shared.
    ///
    /// Rows that do not fill blocks of that type (256 numbers for K-types) are held in Q8_0, whose blocks are of 32;
    /// those that do not fill these either stay as they are, as do norms, biases, scales, low-rank residuals and
    /// learned positions. [`matrix_types`](Self::matrix_types) says what came of it.
    ///
    /// The result is for forward passes: generating, losses, accuracy, and scores that need no gradient. To train, fold
    /// or save, take the decoder from before, or one from [`to_dtype`](Self::to_dtype).
    ///
    /// ```
    /// use foldgpt::{Account, Checkpoint, candle::{DType, Device, quantized::GgmlDType}};
    ///
    /// let dense = Checkpoint::open("examples/tiny-stories")?.decoder(DType::F32, &Device::Cpu)?;
    /// let quantized = dense.quantized(GgmlDType::Q8_0, &mut ())?;
    /// assert_eq!(quantized.matrix_types(), "q8_0");
    /// let bytes = |decoder| Ok::<_, foldgpt::Error>(Account::counted(decoder, 1)?.resident_bytes);
    /// assert!(3 * bytes(&quantized)? < bytes(&dense)?);
    /// # Ok::<(), foldgpt::Error>(())
    /// ```
    ///
    /// # Errors
    /// A type that is none of these, a decoder that is not on the CPU, computes in another type than f32 or is quantised
    /// already, or a cancelling observer.
    pub fn quantized(&self, dtype: GgmlDType, observer: &mut dyn Observer) -> Result<Self> {
        if let Some(names) = expected_instead_of(dtype) {
            return Err(Error::argument("quantised type", ggml_name(dtype), format!("one of {names}")));
        }
        self.check_not_quantized()?;
        if !self.device().is_cpu() {
            let found = format!("{:?}", self.device().location());
            return Err(Error::argument("device of what is quantised", found, "the cpu"));
        }
        let computed = self.final_norm.gain.dtype();
        if computed != DType::F32 {
            let expected = "f32, as beside matrices of f32, f16 or bf16";
            return Err(Error::argument("type that the decoder computes in", computed.as_str(), expected));
        }
        let total = self.matrices().count() as u64;
        let mut quantized = progress::counted(STAGE, total, observer, |report| {
            let mut done = 0;
            self.with_matrices(|matrix| {
                let quantized = matrix.quantized(dtype)?;
                done += 1;
                report(done)?;
                Ok(quantized)
            })
        })?;
        quantized.stored = Some(self.stored.clone().unwrap_or_else(|| self.dtype().into()));
        Ok(quantized)
    }

    /// The types that matrices are held in, that of the most numbers first: `f32`, `bf16`, `q8_0`, `q4_k+q8_0`.
    #[must_use]
    pub fn matrix_types(&self) -> String {
        let mut types: Vec<(String, usize)> = Vec::new();
        for (_, matrix) in self.matrices() {
            let name = matrix.type_name();
            match types.iter_mut().find(|(known, _)| *known == name) {
                Some((_, numbers)) => *numbers += matrix.elem_count(),
                None => types.push((name, matrix.elem_count())),
            }
        }
        types.sort_by_key(|(_, numbers)| std::cmp::Reverse(*numbers));
        types.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join("+")
    }

    /// The matrices that are quantised, each once, with the first parameter that it is.
    pub fn quantized_matrices(&self) -> impl Iterator<Item = (Param, &Arc<QTensor>)> {
        self.matrices().filter_map(|(param, matrix)| Some((param, matrix.as_quantized()?)))
    }

    /// Fails where a matrix is quantised.
    pub(crate) fn check_not_quantized(&self) -> Result<()> {
        match self.matrices().find(|(_, matrix)| matrix.as_quantized().is_some()) {
            Some((param, matrix)) => Err(Error::quantized(param.to_string(), matrix)),
            None => Ok(()),
        }
    }

    /// The same decoder with what quantised matrices stand for in their place, in this type.
    pub(super) fn dequantized(&self, dtype: DType) -> Result<Self> {
        self.with_matrices(|matrix| match matrix {
            Matrix::Tensor(_) => Ok(matrix.clone()),
            Matrix::Quantized(_) => Ok(matrix.widened(dtype)?.into()),
        })
    }

    /// The same decoder with every matrix replaced by what `matrix` makes of it, which sees each once. What depths share
    /// they share again.
    fn with_matrices(&self, mut matrix: impl FnMut(&Matrix) -> Result<Matrix>) -> Result<Self> {
        let mut made: HashMap<MatrixId, Matrix> = HashMap::new();
        let mut once = |value: &Matrix| -> Result<Matrix> {
            match made.entry(value.id()) {
                Entry::Occupied(done) => Ok(done.get().clone()),
                Entry::Vacant(place) => Ok(place.insert(matrix(value)?).clone()),
            }
        };
        let mut mapped = self.clone();
        mapped.embedding = once(&self.embedding)?;
        let mut done: HashMap<*const BlockWeights, Arc<BlockWeights>> = HashMap::new();
        for block in &mut mapped.blocks {
            let weights = match done.entry(Arc::as_ptr(&block.weights)) {
                Entry::Occupied(done) => Arc::clone(done.get()),
                Entry::Vacant(place) => {
                    let of = |projection| block.weights.get(projection).map(&mut once).transpose();
                    Arc::clone(place.insert(Arc::new(BlockWeights::from_fn(of)?)))
                }
            };
            block.weights = weights;
        }
        if let Some(head) = &mut mapped.head {
            *head = once(head)?;
        }
        Ok(mapped)
    }
}
