//! Every fused operation: its gradient against finite differences accumulated in f64, and its value and gradient
//! against candle's primitives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use foldgpt::candle::quantized::{GgmlDType, QTensor};
use foldgpt::candle::{DType, Device, Result, Tensor, Var};
use foldgpt::model::Activation;
use foldgpt::ops::{AttentionShape, Kernels, Matrix};
use support::{distance, values};

type Op = Box<dyn Fn(Kernels, &[Tensor]) -> Result<Tensor>>;

/// An operation on differentiable inputs of given shapes.
struct Case {
    name: String,
    inputs: Vec<Vec<usize>>,
    op: Op,
}

fn case(
    name: impl Into<String>,
    inputs: &[&[usize]],
    op: impl Fn(Kernels, &[Tensor]) -> Result<Tensor> + 'static,
) -> Case {
    Case { name: name.into(), inputs: inputs.iter().map(|shape| shape.to_vec()).collect(), op: Box::new(op) }
}

fn attention_case(name: &str, q: &[usize], k: &[usize], shape: AttentionShape) -> Case {
    case(name, &[q, k, k], move |kernels, x| kernels.attention(&x[0], &x[1], &x[2], shape))
}

fn cases() -> Vec<Case> {
    let plain =
        AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, scale: 0.35, softcap: None, window: None };
    let mut cases = vec![
        case("rms norm", &[&[3, 5, 24], &[24]], |kernels, x| kernels.rms_norm(&x[0], &x[1], 1e-5, 0.0)),
        case("rms norm, unit offset", &[&[7, 40], &[40]], |kernels, x| {
            kernels.rms_norm(&x[0], &x[1], 1e-5, 1.0)
        }),
        case("layer norm", &[&[3, 5, 24], &[24], &[24]], |kernels, x| {
            kernels.layer_norm(&x[0], &x[1], &x[2], 1e-5)
        }),
        case("rope", &[&[2, 6, 32]], |kernels, x| {
            kernels.rope(&x[0], &values(&[6, 4], 8), &values(&[6, 4], 9), 8)
        }),
        case("partial rope", &[&[2, 6, 24]], |kernels, x| {
            kernels.rope(&x[0], &values(&[6, 2], 8), &values(&[6, 2], 9), 12)
        }),
        case("frozen linear", &[&[2, 5, 16]], |kernels, x| kernels.linear(&x[0], values(&[12, 16], 5), None)),
        case("frozen linear with bias", &[&[5, 16]], |kernels, x| {
            kernels.linear(&x[0], values(&[12, 16], 5), Some(&values(&[12], 6)))
        }),
        case("frozen linear, part of a matrix on part of the rows", &[&[25, 50]], |kernels, x| {
            let weight = values(&[140, 50], 5).narrow(0, 3, 131)?;
            kernels.linear(&x[0].narrow(0, 4, 21)?, weight, Some(&values(&[131], 6)))
        }),
        case("sum", &[&[3, 40], &[3, 40]], |kernels, x| kernels.add(&x[0], &x[1])),
        case("column scales", &[&[3, 5, 24], &[24]], |kernels, x| kernels.scale(&x[0], &x[1])),
        case("inner product", &[&[3, 40]], |kernels, x| kernels.inner(&x[0], &values(&[3, 40], 5))),
        case("loss", &[&[200, 16]], |kernels, x| {
            kernels.nll(&x[0], values(&[50, 16], 5), &targets(200, 50), None)
        }),
        case("loss, soft cap", &[&[9, 16]], |kernels, x| {
            kernels.nll(&x[0], values(&[50, 16], 5), &targets(9, 50), Some(2.0))
        }),
        case("loss, trained head", &[&[9, 16], &[50, 16]], |kernels, x| {
            kernels.nll(&x[0], &x[1], &targets(9, 50), None)
        }),
        attention_case("attention", &[2, 9, 32], &[2, 9, 16], plain),
        attention_case("attention over several tiles", &[1, 150, 32], &[1, 150, 16], plain),
        attention_case("attention with a cache", &[2, 5, 32], &[2, 12, 16], plain),
        attention_case("attention of one query", &[2, 1, 32], &[2, 12, 16], plain),
        attention_case(
            "attention of one query in a window",
            &[2, 1, 32],
            &[2, 12, 16],
            AttentionShape { window: Some(5), ..plain },
        ),
        attention_case(
            "attention in a window",
            &[2, 80, 32],
            &[2, 80, 16],
            AttentionShape { window: Some(5), ..plain },
        ),
        attention_case(
            "attention, soft cap",
            &[1, 70, 32],
            &[1, 75, 16],
            AttentionShape { softcap: Some(1.5), ..plain },
        ),
        attention_case(
            "attention of one kv head",
            &[1, 9, 32],
            &[1, 9, 8],
            AttentionShape { kv_heads: 1, ..plain },
        ),
    ];
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
        cases.push(case(format!("gated {activation:?}"), &[&[4, 33], &[4, 33]], move |kernels, x| {
            kernels.gated(activation, &x[0], &x[1])
        }));
        cases.push(case(format!("plain {activation:?}"), &[&[4, 33]], move |kernels, x| {
            kernels.activation(activation, &x[0])
        }));
    }
    cases
}

fn targets(rows: u32, vocab: u32) -> Vec<u32> {
    (0..rows).map(|row| row * 7 % vocab).collect()
}

fn variables(case: &Case) -> Vec<Var> {
    let inputs = case.inputs.iter().zip(1..);
    inputs.map(|(shape, seed)| Var::from_tensor(&values(shape, seed)).unwrap()).collect()
}

fn run(case: &Case, kernels: Kernels, inputs: &[Var]) -> Tensor {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| input.as_tensor().clone()).collect();
    (case.op)(kernels, &inputs).unwrap()
}

/// The gradients of Σ output · weights.
fn gradients(case: &Case, kernels: Kernels, inputs: &[Var]) -> Vec<Tensor> {
    let output = run(case, kernels, inputs);
    let loss = (&output * values(output.dims(), 77)).unwrap().sum_all().unwrap();
    let store = loss.backward().unwrap();
    let gradient =
        |input: &Var| store.get(input).unwrap_or_else(|| panic!("{}: no gradient", case.name)).clone();
    inputs.iter().map(gradient).collect()
}

/// Σ output · weights, in f64.
fn objective(case: &Case, kernels: Kernels, inputs: &[Var]) -> f64 {
    let output = run(case, kernels, inputs).detach();
    let weights = values(output.dims(), 77).to_dtype(DType::F64).unwrap();
    (output.to_dtype(DType::F64).unwrap() * weights).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    (wide(a) * wide(b)).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 5e-3;
    for case in cases() {
        let inputs = variables(&case);
        let found = gradients(&case, Kernels::Fused, &inputs);
        for (place, gradient) in found.iter().enumerate() {
            for seed in 100..104 {
                let direction = values(inputs[place].dims(), seed);
                let original = inputs[place].as_tensor().copy().unwrap();
                let at = |step: f64| {
                    inputs[place].set(&(&original + (&direction * step).unwrap()).unwrap()).unwrap();
                    objective(&case, Kernels::Fused, &inputs)
                };
                // Fourth-order central difference.
                let slope =
                    (8.0 * (at(STEP) - at(-STEP)) - (at(2.0 * STEP) - at(-2.0 * STEP))) / (12.0 * STEP);
                inputs[place].set(&original).unwrap();
                let expected = dot(gradient, &direction);
                let size = (dot(gradient, gradient) * dot(&direction, &direction)).sqrt();
                let off = (slope - expected).abs() / size;
                assert!(off < 2e-4, "{} input {place}: slope {slope}, gradient {expected}", case.name);
            }
        }
    }
}

#[test]
fn values_and_gradients_are_those_of_the_primitives() {
    for case in cases() {
        let inputs = variables(&case);
        let off = distance(&run(&case, Kernels::Fused, &inputs), &run(&case, Kernels::Primitive, &inputs));
        assert!(off < 2e-6, "{}: values off by {off}", case.name);
        let fused = gradients(&case, Kernels::Fused, &inputs);
        let primitive = gradients(&case, Kernels::Primitive, &inputs);
        for (place, (fused, primitive)) in fused.iter().zip(&primitive).enumerate() {
            let off = distance(fused, primitive);
            assert!(off < 1e-5, "{}: gradient {place} off by {off}", case.name);
        }
    }
}

/// Loss alone, without a graph, takes another way than loss with its gradient: in several stretches of the vocabulary and
/// several groups of rows.
#[test]
fn the_loss_of_a_large_vocabulary_is_that_of_the_primitives() {
    let (rows, vocab) = (600, 4000);
    let (hidden, head) = (values(&[rows, 16], 1), values(&[vocab, 16], 2));
    let targets: Vec<u32> = (0..rows as u32).map(|row| row * 1237 % vocab as u32).collect();
    let tracked = Var::from_tensor(&hidden).unwrap();
    for softcap in [None, Some(2.0)] {
        let nll = |kernels: Kernels, hidden: &Tensor| kernels.nll(hidden, &head, &targets, softcap).unwrap();
        let alone = nll(Kernels::Fused, &hidden);
        let off = distance(&alone, &nll(Kernels::Primitive, &hidden));
        assert!(off < 2e-6, "{softcap:?}: off the primitives by {off}");
        let off = distance(&alone, &nll(Kernels::Fused, tracked.as_tensor()).detach());
        assert!(off < 2e-6, "{softcap:?}: off the loss with its gradient by {off}");
    }
}

#[test]
fn a_frozen_weight_keeps_no_gradient() {
    let x = Var::from_tensor(&values(&[4, 16], 1)).unwrap();
    let weight = values(&[12, 16], 2);
    let y = Kernels::Fused.linear(&x, &weight, None).unwrap();
    let store = y.sum_all().unwrap().backward().unwrap();
    assert!(store.get(&x).is_some() && store.get(&weight).is_none());
}

#[test]
fn not_a_number_is_passed_on() {
    let x = Tensor::full(f32::NAN, (1, 3, 16), &Device::Cpu).unwrap();
    let ones = Tensor::ones(16, DType::F32, &Device::Cpu).unwrap();
    let shape =
        AttentionShape { heads: 2, kv_heads: 2, head_dim: 8, scale: 1.0, softcap: None, window: None };
    let kernels = Kernels::Fused;
    let weight = values(&[60, 32], 1);
    let blocks = |dtype| Matrix::Quantized(Arc::new(QTensor::quantize(&weight, dtype).unwrap()));
    let (narrow, q8_0, q4_0) =
        (weight.to_dtype(DType::BF16).unwrap(), blocks(GgmlDType::Q8_0), blocks(GgmlDType::Q4_0));
    // Of one row, of few and of many.
    let wide = |rows| Tensor::full(f32::NAN, (1, rows, 32), &Device::Cpu).unwrap();
    let products = [1, 3, 21].map(|rows| {
        let product = |matrix: Matrix| kernels.linear(&wide(rows), matrix, None).unwrap();
        [(&weight).into(), (&narrow).into(), q8_0.clone(), q4_0.clone()].map(product)
    });
    let outputs = [
        kernels.rms_norm(&x, &ones, 1e-5, 0.0).unwrap(),
        kernels.attention(&x, &x, &x, shape).unwrap(),
        kernels.gated(Activation::Silu, &x, &x).unwrap(),
        kernels.nll(&x.squeeze(0).unwrap(), values(&[5, 16], 1), &[0, 1, 2], None).unwrap(),
    ];
    for output in outputs.iter().chain(products.iter().flatten()) {
        let values = output.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|value| value.is_nan()));
    }
}
