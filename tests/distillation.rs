//! The losses at the head: values against torch, gradients against finite differences, fused against primitive.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::ops::{Head, HeadLoss, HeadWeights, Kernels, Soft, TopTokens};
use support::{distance, values};

const ROWS: usize = 150;
const WIDTH: usize = 16;
const VOCAB: usize = 50;

/// A student and a teacher of other width over one vocabulary.
struct Case {
    hidden: Tensor,
    weight: Tensor,
    softcap: Option<f64>,
    states: Tensor,
    teacher: Tensor,
    top: Option<TopTokens>,
    alone: bool,
    weights: HeadWeights,
}

impl Case {
    fn new() -> Self {
        Self {
            hidden: values(&[ROWS, WIDTH], 1),
            weight: values(&[VOCAB, WIDTH], 2),
            softcap: None,
            states: values(&[ROWS, 12], 3),
            teacher: values(&[VOCAB, 12], 4),
            top: None,
            alone: false,
            weights: HeadWeights { cross_entropy: 0.7, divergence: 0.4, temperature: 2.0 },
        }
    }

    fn all() -> Vec<(&'static str, Self)> {
        let top = |count| {
            let case = Self::new();
            let head = Head { weight: &case.teacher, softcap: None };
            Some(Kernels::Fused.top_tokens(&case.states, head, count, 2.0).unwrap())
        };
        vec![
            ("alone", Self { alone: true, ..Self::new() }),
            ("whole teacher", Self::new()),
            ("soft cap", Self { softcap: Some(2.0), ..Self::new() }),
            ("likeliest tokens", Self { top: top(5), ..Self::new() }),
            ("likeliest tokens, soft cap", Self { top: top(5), softcap: Some(2.0), ..Self::new() }),
            ("all tokens", Self { top: top(VOCAB), ..Self::new() }),
        ]
    }

    fn run(&self, kernels: Kernels) -> HeadLoss {
        let targets: Vec<u32> = (0..ROWS as u32).map(|row| row * 7 % VOCAB as u32).collect();
        let head = Head { weight: &self.weight, softcap: self.softcap };
        let teacher = Head { weight: &self.teacher, softcap: None };
        let soft = match &self.top {
            Some(top) => Soft::Top(top),
            None => Soft::States(&self.states, teacher),
        };
        let soft = (!self.alone).then_some(soft);
        kernels.head_loss(&self.hidden, head, &targets, soft, self.weights, true).unwrap()
    }

    fn total(&self) -> f64 {
        let loss = self.run(Kernels::Fused);
        self.weights.cross_entropy * loss.cross_entropy + self.weights.divergence * loss.divergence
    }
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    (wide(a) * wide(b)).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-2;
    for (name, mut case) in Case::all() {
        let loss = case.run(Kernels::Fused);
        for (of_weight, gradient) in [(false, loss.hidden), (true, loss.weight.unwrap())] {
            for seed in 100..103 {
                let direction = values(gradient.dims(), seed);
                let original = if of_weight { case.weight.clone() } else { case.hidden.clone() };
                let mut at = |step: f64| {
                    let moved = (&original + (&direction * step).unwrap()).unwrap();
                    *(if of_weight { &mut case.weight } else { &mut case.hidden }) = moved;
                    case.total()
                };
                let slope =
                    (8.0 * (at(STEP) - at(-STEP)) - (at(2.0 * STEP) - at(-2.0 * STEP))) / (12.0 * STEP);
                at(0.0);
                let expected = dot(&gradient, &direction);
                let size = (dot(&gradient, &gradient) * dot(&direction, &direction)).sqrt();
                let off = (slope - expected).abs() / size;
                assert!(off < 2e-4, "{name}, weight {of_weight}: slope {slope}, gradient {expected}");
            }
        }
    }
}

#[test]
fn fused_losses_and_gradients_are_those_of_the_primitives() {
    for (name, case) in Case::all() {
        let (fused, primitive) = (case.run(Kernels::Fused), case.run(Kernels::Primitive));
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
        assert!(close(fused.cross_entropy, primitive.cross_entropy), "{name}");
        assert!(
            close(fused.divergence, primitive.divergence),
            "{name}: {} {}",
            fused.divergence,
            primitive.divergence
        );
        assert!(distance(&fused.hidden, &primitive.hidden) < 1e-5, "{name}");
        assert!(distance(&fused.weight.unwrap(), &primitive.weight.unwrap()) < 1e-5, "{name}");
    }
}

/// torch 2.9.1 in f64: `kl_div(log_softmax(s / 2), log_softmax(t / 2), log_target=True)` of each row times 2², and the
/// gradient of the sum.
#[test]
fn divergence_is_that_of_torch() {
    let tensor = |rows: [[f32; 4]; 2]| Tensor::new(&rows, &Device::Cpu).unwrap();
    let student = tensor([[0.1, -0.4, 1.2, 0.7], [2.0, 0.0, -1.0, 0.5]]);
    let teacher = tensor([[0.3, -0.1, 0.9, 1.1], [-0.5, 1.5, 0.25, 0.0]]);
    let gradient = tensor([
        [-0.017_785_653, -0.030_987_284, 0.133_705_21, -0.084_932_27],
        [0.659_558_2, -0.485_345_28, -0.234_373_42, 0.060_160_525],
    ]);
    let identity = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap();
    let head = Head { weight: &identity, softcap: None };
    let weights = HeadWeights { cross_entropy: 0.0, divergence: 1.0, temperature: 2.0 };
    let soft = Some(Soft::States(&teacher, head));
    let loss = Kernels::Fused.head_loss(&student, head, &[0, 1], soft, weights, false).unwrap();
    let expected = 4.0 * (0.010_711_123_378_900_907 + 0.322_391_112_550_411_5);
    assert!((loss.divergence - expected).abs() < 1e-6, "{}, expected {expected}", loss.divergence);
    assert!(distance(&loss.hidden, &gradient) < 1e-5);
    assert!(loss.weight.is_none());
}

#[test]
fn likeliest_tokens_bound_the_divergence_from_below_and_reach_it() {
    let mut found = Vec::new();
    for count in [1, 5, 20, VOCAB] {
        let mut case = Case::new();
        let head = Head { weight: &case.teacher, softcap: None };
        case.top = Some(Kernels::Fused.top_tokens(&case.states, head, count, 2.0).unwrap());
        found.push(case.run(Kernels::Fused).divergence);
    }
    let whole = Case::new().run(Kernels::Fused).divergence;
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "{found:?}");
    assert!((found[3] - whole).abs() < 1e-4 * whole, "{found:?}, expected {whole}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new();
    let head = Head { weight: &case.weight, softcap: None };
    let run = |targets: &[u32], soft| {
        Kernels::Fused.head_loss(&case.hidden, head, targets, soft, case.weights, false)
    };
    let targets = vec![0u32; ROWS];
    assert!(run(&targets[1..], None).is_err());
    assert!(run(&vec![VOCAB as u32; ROWS], None).unwrap_err().to_string().contains("vocabulary"));
    let other = values(&[VOCAB + 1, 12], 4);
    let soft = Soft::States(&case.states, Head { weight: &other, softcap: None });
    assert!(run(&targets, Some(soft)).unwrap_err().to_string().contains("teacher"));
}
