//! Linear maps, frozen and trained.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::frozen::{Frozen, one_row_by_all};
use super::simd::{add_scaled, vectorised};
use super::{Kernels, Matrix, task_rows};

impl Kernels {
    /// `x · Wᵀ + bias`: `x` is `(…, in)`, `weight` is `(out, in)`, `bias` is `(out)`.
    ///
    /// A weight that is not trained gets no gradient computed and none kept. It may be of a smaller type than `x`,
    /// whose type the result has: with a weight in bf16, 8 rows of f32 and more are rounded to bf16 and summed in f32, and
    /// fewer are not rounded; with a quantised one 16 rows and more are rounded to bf16 too, and fewer to 8 bits a
    /// number, each block of a row with a factor of its own.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub fn linear(self, x: &Tensor, weight: impl Into<Matrix>, bias: Option<&Tensor>) -> Result<Tensor> {
        let weight = weight.into();
        let frozen_bias = bias.is_none_or(|bias| !bias.track_op() && self.fuses(&[bias]));
        if let (Some(weight), true) = (self.frozen(&weight), frozen_bias && self.fuses(&[x])) {
            return x.contiguous()?.apply_op1(FrozenLinear { weight, bias: bias.cloned() });
        }
        let (mut shape, (output, input)) = (x.dims().to_vec(), weight.dims2()?);
        let mut y = x.reshape(((), input))?.matmul(&weight.widened(x.dtype())?.t()?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        y.reshape(shape)
    }

    /// [`linear`](Self::linear) maps of one input, in the order in which they are given; of one row that nothing is trained
    /// through, all at once.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub(crate) fn linears(self, x: &Tensor, maps: &[(&Matrix, Option<&Tensor>)]) -> Result<Vec<Tensor>> {
        match self.one_row(x, maps)? {
            Some(results) => Ok(results),
            None => maps.iter().map(|&(weight, bias)| self.linear(x, weight, bias)).collect(),
        }
    }

    /// The results of maps of one row, where they can be had at once.
    fn one_row(self, x: &Tensor, maps: &[(&Matrix, Option<&Tensor>)]) -> Result<Option<Vec<Tensor>>> {
        let trained = x.track_op() || maps.iter().any(|(_, bias)| bias.is_some_and(Tensor::track_op));
        let is_row = x.dims().last() == Some(&x.elem_count());
        if trained || !is_row || !self.fuses(&[x]) {
            return Ok(None);
        }
        let weights: Option<Vec<_>> = maps.iter().map(|&(weight, _)| self.frozen(weight)).collect();
        let Some(weights) = weights else { return Ok(None) };
        let Some(products) = super::with_elements([&x.contiguous()?], |[x]| one_row_by_all(x, &weights))?
        else {
            return Ok(None);
        };
        let tensors = products.into_iter().zip(maps).map(|(product, &(_, bias))| {
            let mut shape = x.dims().to_vec();
            if let Some(last) = shape.last_mut() {
                *last = product.len();
            }
            let product = Tensor::from_vec(product, shape, x.device())?;
            bias.map_or(Ok(product.clone()), |bias| product.broadcast_add(bias))
        });
        tensors.collect::<Result<_>>().map(Some)
    }

    /// `grad · W`: the gradient of the input of [`linear`](Self::linear) from that of its output. `grad` is
    /// `(…, out)`, `weight` is `(out, in)`. A step of a backward pass, itself not differentiated.
    ///
    /// # Errors
    /// Shapes that do not fit, or a failed computation.
    pub(crate) fn linear_back(self, grad: &Tensor, weight: &Matrix) -> Result<Tensor> {
        let (mut shape, (output, input)) = (grad.dims().to_vec(), weight.dims2()?);
        if let Some(last) = shape.last_mut() {
            *last = input;
        }
        if let (Some(weight), true) = (self.frozen(weight), self.fuses(&[grad])) {
            return weight.back(grad, shape);
        }
        let weight = weight.widened(grad.dtype())?.detach();
        grad.detach().reshape(((), output))?.matmul(&weight)?.reshape(shape)
    }
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
            })?;
        }
        let mut shape = lx.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        Ok((CpuStorage::F32(y), shape.into()))
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
    use candle_core::{DType, Device, Var};

    use super::*;

    fn random(shape: (usize, usize)) -> Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
    }

    #[test]
    fn maps_of_one_input_are_those_of_each_alone() -> Result<()> {
        let (wide, narrow) = (random((7, 40))?, random((600, 40))?.to_dtype(DType::BF16)?);
        let turned = random((40, 5))?.t()?;
        let bias = Tensor::randn(0f32, 1f32, 600, &Device::Cpu)?;
        let [wide, narrow, turned] = [wide, narrow, turned].map(Matrix::Tensor);
        let lying = vec![(&wide, None), (&narrow, Some(&bias)), (&narrow, None)];
        for (maps, rows) in [(lying.clone(), 1), (lying, 3), (vec![(&wide, None), (&turned, None)], 1)] {
            let x = random((rows, 40))?.unsqueeze(0)?;
            let found = Kernels::Fused.linears(&x, &maps)?;
            assert_eq!(found.len(), maps.len());
            for (found, (weight, bias)) in found.iter().zip(maps) {
                let expected = Kernels::Fused.linear(&x, weight, bias)?;
                assert_eq!(found.dims(), expected.dims());
                let bits = |y: &Tensor| y.flatten_all()?.to_vec1::<f32>();
                assert_eq!(bits(found)?, bits(&expected)?);
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_trained_gets_its_gradient_from_one_row_too() -> Result<()> {
        let trained = Var::from_tensor(&random((3, 8))?)?;
        let (weight, frozen) = (Matrix::from(trained.as_tensor()), Matrix::from(random((3, 8))?));
        let bias = Var::from_tensor(&Tensor::zeros(3, DType::F32, &Device::Cpu)?)?;
        let x = Var::from_tensor(&random((1, 8))?)?;
        let sum = |x: &Tensor, maps: &[(&Matrix, Option<&Tensor>)]| {
            Kernels::Fused
                .linears(x, maps)?
                .iter()
                .try_fold(Tensor::zeros((), DType::F32, x.device())?, |sum, y| sum + y.sum_all()?)
        };
        let grads = sum(&x.detach(), &[(&weight, None), (&frozen, Some(&bias))])?.backward()?;
        assert!(grads.get(&trained).is_some() && grads.get(&bias).is_some());
        assert!(sum(&x, &[(&frozen, None), (&frozen, None)])?.backward()?.get(&x).is_some());
        Ok(())
    }

    #[test]
    fn a_row_of_another_width_is_refused() -> Result<()> {
        // As many numbers as whole rows of this width would have.
        let weight = Matrix::from(random((4, 6))?);
        assert!(Kernels::Fused.linears(&random((1, 12))?, &[(&weight, None)]).is_err());
        Ok(())
    }
}
