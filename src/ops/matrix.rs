//! Matrices of linear maps, in whichever form they are held.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor, TensorId, bail};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// A matrix `(outputs, inputs)` as it is held. A clone is the same matrix, and takes no room.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Matrix {
    /// One number for each element, in f32 or a half-precision type.
    Tensor(Tensor),
    /// Blocks of a few bits an element, in one of ggml's types. Products have no backward. Of a few rows, blocks are
    /// multiplied as they lie, and each row that goes in is rounded to 8 bits a number: of one row by Q8_0 our own on x86-64,
    /// candle's otherwise. Of 16 rows and more, blocks and rows are brought into bf16 on the way.
    Quantized(Arc<QTensor>),
}

/// What tells matrices apart that are not only alike but the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum MatrixId {
    Tensor(TensorId),
    Quantized(usize),
}

/// The types that matrices are quantised to, with ggml's names for them: those whose products candle has vectorised.
const QUANTIZED: [(GgmlDType, &str); 5] = [
    (GgmlDType::Q4_0, "q4_0"),
    (GgmlDType::Q8_0, "q8_0"),
    (GgmlDType::Q4K, "q4_k"),
    (GgmlDType::Q5K, "q5_k"),
    (GgmlDType::Q6K, "q6_k"),
];

/// ggml's name for a type.
pub(crate) fn ggml_name(dtype: GgmlDType) -> String {
    let known = QUANTIZED.iter().find(|(known, _)| *known == dtype);
    known.map_or_else(|| format!("{dtype:?}").to_lowercase(), |(_, name)| (*name).to_owned())
}

/// The names of all types that matrices can be quantised to; `None` where `dtype` is one of them.
pub(crate) fn expected_instead_of(dtype: GgmlDType) -> Option<String> {
    let names = || QUANTIZED.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    QUANTIZED.iter().all(|(known, _)| *known != dtype).then(names)
}

impl Matrix {
    /// The tensor, where the matrix is one.
    #[must_use]
    pub fn as_tensor(&self) -> Option<&Tensor> {
        match self {
            Self::Tensor(tensor) => Some(tensor),
            Self::Quantized(_) => None,
        }
    }

    /// The blocks, where the matrix is quantised.
    #[must_use]
    pub fn as_quantized(&self) -> Option<&Arc<QTensor>> {
        match self {
            Self::Tensor(_) => None,
            Self::Quantized(blocks) => Some(blocks),
        }
    }

    /// `(outputs, inputs)`.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Tensor(tensor) => tensor.dims2(),
            Self::Quantized(blocks) => blocks.shape().dims2(),
        }
    }

    /// The number of elements.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.elem_count(),
            Self::Quantized(blocks) => blocks.shape().elem_count(),
        }
    }

    /// The name of the type that it is held in: `f32`, `bf16`, `q8_0`, `q4_k`.
    #[must_use]
    pub fn type_name(&self) -> String {
        match self {
            Self::Tensor(tensor) => tensor.dtype().as_str().to_owned(),
            Self::Quantized(blocks) => ggml_name(blocks.dtype()),
        }
    }

    /// The matrix with one number for each element, in `dtype`.
    ///
    /// # Errors
    /// A failed computation.
    pub fn widened(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => tensor.to_dtype(dtype),
            Self::Quantized(blocks) => blocks.dequantize(&blocks.device())?.to_dtype(dtype),
        }
    }

    /// The rows of these ids, `(n)`: `(n, inputs)` in the matrix's type, f32 where it is quantised.
    pub(crate) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => tensor.index_select(ids, 0),
            Self::Quantized(blocks) => blocks.embedding(ids),
        }
    }

    /// The same matrix in blocks of `wanted`; of Q8_0, which are smaller, where rows do not fill those; and as it is
    /// where they do not fill blocks of Q8_0 either.
    pub(crate) fn quantized(&self, wanted: GgmlDType) -> Result<Self> {
        let Self::Tensor(tensor) = self else { bail!("the matrix is quantised already") };
        let inputs = tensor.dims2()?.1;
        let fits = |dtype: &GgmlDType| inputs.is_multiple_of(dtype.block_size());
        let Some(dtype) = [wanted, GgmlDType::Q8_0].into_iter().find(fits) else { return Ok(self.clone()) };
        // Candle quantises a storage from its beginning on, whatever part of it the tensor is.
        let whole = tensor.detach().to_dtype(DType::F32)?.force_contiguous()?;
        Ok(Self::Quantized(Arc::new(QTensor::quantize(&whole, dtype)?)))
    }

    /// The matrix with its tensor replaced; a quantised one as it is.
    pub(crate) fn map<E>(&self, tensor: impl FnOnce(&Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        match self {
            Self::Tensor(value) => tensor(value).map(Self::Tensor),
            Self::Quantized(_) => Ok(self.clone()),
        }
    }

    pub(crate) fn id(&self) -> MatrixId {
        match self {
            Self::Tensor(tensor) => MatrixId::Tensor(tensor.id()),
            Self::Quantized(blocks) => MatrixId::Quantized(Arc::as_ptr(blocks).addr()),
        }
    }

    /// Whether it is trained, or made of what is.
    pub(crate) fn track_op(&self) -> bool {
        self.as_tensor().is_some_and(Tensor::track_op)
    }
}

impl From<Tensor> for Matrix {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl From<&Tensor> for Matrix {
    fn from(tensor: &Tensor) -> Self {
        Self::Tensor(tensor.clone())
    }
}

impl From<&Matrix> for Matrix {
    fn from(matrix: &Matrix) -> Self {
        matrix.clone()
    }
}
