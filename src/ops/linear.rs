//! Linear maps, frozen and trained.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::frozen::{self, Frozen};
use super::simd::{add_scaled, vectorised};
use super::{Kernels, Matrix, task_rows};

impl Kernels {
    /// `x · Wᵀ + bias`: `x` is `(…, in)`, `weight` is `(out, in)`, `bias` is `(out)`.
    ///
    /// A weight that is not trained gets no gradient computed and none kept. It may be of a smaller type than `x`,
    /// whose type the result has: with a weight in bf16, 8 rows of f32 and more are rounded to bf16 and summed in f32, and
    /// fewer are not rounded; with a quantised one 16 rows and more are rounded to bf16 too, and fewer to 8 bits a
    /// number, each block of a row with a factor of its own (which may itself be rounded in another way of one row than of
    /// several).
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn linear(self, x: &Tensor, weight: impl Into<Matrix>, bias: Option<&Tensor>) -> Result<Tensor> {
        let weight = weight.into();
        if let (Some(weight), true) = (self.frozen(&weight), self.fuses(&[x]) && self.freezes(bias)) {
            return x.contiguous()?.apply_op1(FrozenLinear { weight, bias: bias.cloned() });
        }
        let (output, input) = weight.dims2()?;
        let mut y = x.reshape(((), input))?.matmul(&weight.widened(x.dtype())?.t()?)?;
        if let Some(bias) = bias {
            checked_bias(bias, output)?;
            y = y.broadcast_add(bias)?;
        }
        y.reshape(with_width(x.dims(), output))
    }

    /// [`linear`](Self::linear) maps of one input, in the order in which they are given; of one row that nothing is trained
    /// through, all at once.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub(crate) fn linears(self, x: &Tensor, maps: &[(&Matrix, Option<&Tensor>)]) -> Result<Vec<Tensor>> {
        match self.at_once(x, maps)? {
            Some(results) => Ok(results),
            None => maps.iter().map(|&(weight, bias)| self.linear(x, weight, bias)).collect(),
        }
    }

    /// The maps of one row, where they can be had at once.
    fn at_once(self, x: &Tensor, maps: &[(&Matrix, Option<&Tensor>)]) -> Result<Option<Vec<Tensor>>> {
        let is_row = x.dims().last() == Some(&x.elem_count());
        if !is_row || x.track_op() || !self.fuses(&[x]) || !maps.iter().all(|&(_, bias)| self.freezes(bias)) {
            return Ok(None);
        }
        let weights: Option<Vec<_>> = maps.iter().map(|&(weight, _)| self.frozen(weight)).collect();
        let Some(weights) = weights else { return Ok(None) };
        let results = super::with_elements([&x.contiguous()?], |[x]| frozen::one_row(x, &weights))?;
        let Some(results) = results else { return Ok(None) };
        let tensors = results.into_iter().zip(maps).map(|(mut y, &(_, bias))| {
            let output = y.len();
            if let Some(bias) = bias {
                add_bias(&mut y, output, bias)?;
            }
            Tensor::from_vec(y, with_width(x.dims(), output), x.device())
        });
        tensors.collect::<Result<_>>().map(Some)
    }

    /// Whether a bias can be a part of fused maps.
    fn freezes(self, bias: Option<&Tensor>) -> bool {
        bias.is_none_or(|bias| !bias.track_op() && self.fuses(&[bias]))
    }

    /// `grad · W`: the gradient of the input of [`linear`](Self::linear) from that of its output. `grad` is
    /// `(…, out)`, `weight` is `(out, in)`. A step of a backward pass, itself not differentiated.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub(crate) fn linear_back(self, grad: &Tensor, weight: &Matrix) -> Result<Tensor> {
        let (output, input) = weight.dims2()?;
        let shape = with_width(grad.dims(), input);
        if let (Some(weight), true) = (self.frozen(weight), self.fuses(&[grad])) {
            return weight.back(grad, shape);
        }
        let weight = weight.widened(grad.dtype())?.detach();
        grad.detach().reshape(((), output))?.matmul(&weight)?.reshape(shape)
    }
}

/// A shape with another last dimension.
fn with_width(dims: &[usize], width: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    dims
}

fn checked_bias(bias: &Tensor, output: usize) -> Result<()> {
    if bias.dims() != [output] {
        bail!("a bias of shape {:?}, expected [{output}]", bias.dims());
    }
    Ok(())
}

/// Adds a bias to every row of `output` numbers.
fn add_bias(y: &mut [f32], output: usize, bias: &Tensor) -> Result<()> {
    checked_bias(bias, output)?;
    super::with_elements([&bias.contiguous()?], |[bias]| {
        y.par_chunks_mut(task_rows(output) * output).for_each(|rows| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact_mut(output) {
                        add_scaled(row, 1.0, bias);
                    }
                },
            );
        });
        Ok(())
    })
}

struct FrozenLinear {
    weight: Frozen,
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (output, input) = self.weight.dims()?;
        super::checked_width(lx, input)?;
        let mut y = self.weight.forward(x, lx.start_offset(), lx.shape().elem_count() / input)?;
        if let Some(bias) = &self.bias {
            add_bias(&mut y, output, bias)?;
        }
        Ok((CpuStorage::F32(y), with_width(lx.dims(), output).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.weight.back(grad, x.dims().to_vec())?))
    }
}

impl Frozen {
    /// `grad · W` as a tensor of this shape.
    fn back(&self, grad: &Tensor, shape: Vec<usize>) -> Result<Tensor> {
        let output = self.dims()?.0;
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("gradient is not on the cpu") };
        super::checked_width(layout, output)?;
        let dx = self.backward(storage, layout.start_offset(), grad.elem_count() / output)?;
        Tensor::from_vec(dx, shape, grad.device())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::{DType, Device, Var};

    use super::*;

    fn random(shape: (usize, usize)) -> Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
    }

    fn bits(y: &Tensor) -> Result<Vec<u32>> {
        Ok(y.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn maps_of_one_row_are_had_at_once() -> Result<()> {
        let [wide, narrow, blocks] = [(7, 64), (600, 64), (600, 64)].map(random);
        let (wide, narrow) = (Matrix::from(wide?), Matrix::from(narrow?.to_dtype(DType::BF16)?));
        let bias = Tensor::randn(0f32, 1f32, 600, &Device::Cpu)?;
        let mut maps = vec![(&wide, None), (&narrow, Some(&bias)), (&narrow, None)];
        let blocks = Matrix::from(blocks?).quantized(GgmlDType::Q8_0)?;
        if cfg!(target_arch = "x86_64") {
            maps.push((&blocks, Some(&bias)));
        }
        let x = random((1, 64))?.unsqueeze(0)?;
        let Some(found) = Kernels::Fused.at_once(&x, &maps)? else { bail!("not at once") };
        assert_eq!(found.len(), maps.len());
        for (found, (weight, bias)) in found.iter().zip(maps) {
            let alone = Kernels::Fused.linear(&x, weight, bias)?;
            assert_eq!(found.dims(), alone.dims());
            assert_eq!(bits(found)?, bits(&alone)?);
            let expected = Kernels::Primitive.linear(&x, weight, bias)?;
            let difference = (found - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // Of 64 products of normal numbers, one side rounded to 8 bits.
            let bound = if weight.as_quantized().is_some() { 0.2 } else { 1e-4 };
            assert!(difference < bound, "{difference}");
        }
        Ok(())
    }

    #[test]
    fn other_maps_are_those_of_each_alone() -> Result<()> {
        let lying = Matrix::from(random((7, 64))?);
        let turned = Matrix::from(random((64, 5))?.t()?);
        let blocks = Matrix::from(random((5, 64))?).quantized(GgmlDType::Q4_0)?;
        for (rows, second) in [(3, &lying), (1, &turned), (1, &blocks)] {
            let (x, maps) = (random((rows, 64))?, [(&lying, None), (second, None)]);
            assert!(Kernels::Fused.at_once(&x, &maps)?.is_none());
            for (found, (weight, _)) in Kernels::Fused.linears(&x, &maps)?.iter().zip(maps) {
                assert_eq!(bits(found)?, bits(&Kernels::Fused.linear(&x, weight, None)?)?);
            }
        }
        Ok(())
    }

    /// Of everything that can be trained, each beside frozen ones, the gradient is that of candle's primitives.
    #[test]
    fn what_is_trained_gets_its_gradient_from_one_row_too() -> Result<()> {
        let var = |shape| Var::from_tensor(&random(shape)?);
        let (x, weight) = (var((1, 8))?, var((3, 8))?);
        let bias = Var::from_tensor(&Tensor::randn(0f32, 1f32, 3, &Device::Cpu)?)?;
        let (trained, frozen) = (Matrix::from(weight.as_tensor()), Matrix::from(random((3, 8))?));
        let fixed = random((1, 8))?;
        let gradient = |kernels: Kernels, x: &Tensor, map: (&Matrix, Option<&Tensor>), of: &Var| {
            let results = kernels.linears(x, &[map, (&frozen, None)])?;
            let loss = Tensor::stack(&results, 0)?.sqr()?.sum_all()?;
            let grads = loss.backward()?;
            let Some(gradient) = grads.get(of) else { bail!("no gradient") };
            gradient.flatten_all()?.to_vec1::<f32>()
        };
        for (x, map, of) in [
            (x.as_tensor(), (&frozen, None), &x),
            (&fixed, (&trained, None), &weight),
            (&fixed, (&frozen, Some(bias.as_tensor())), &bias),
        ] {
            let found = gradient(Kernels::Fused, x, map, of)?;
            let expected = gradient(Kernels::Primitive, x, map, of)?;
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-4, "{found} and {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let weight = Matrix::from(random((4, 6))?);
        // 24 numbers are two rows of 12 as well.
        assert!(Kernels::Fused.linears(&random((1, 12))?, &[(&weight, None)]).is_err());
        let bias = random((1, 4))?;
        for (rows, kernels) in [(1, Kernels::Fused), (2, Kernels::Fused), (2, Kernels::Primitive)] {
            assert!(kernels.linears(&random((rows, 6))?, &[(&weight, Some(&bias))]).is_err());
        }
        Ok(())
    }
}
