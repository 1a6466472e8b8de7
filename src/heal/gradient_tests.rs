//! Gradients of the walk back, block by block with fused operations, against differentiating the whole graph of
//! candle's primitives at once: on every family, dense and folded, for everything that can be trained.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;

use super::backward::{Backward, Gradients, Uses};
use super::losses::{Losses, Terms};
use super::teacher::Teacher;
use super::trainable::{Lora, ParamGroup, Student, Trainable};
use crate::model::{Adapter, Decoder, Projection};
use crate::ops::Kernels;
use crate::{Checkpoint, Error};

const FAMILIES: [&str; 11] = [
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "llama-tied-rope3",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
];

fn load(family: &str) -> Decoder {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
    Checkpoint::open(path).unwrap().decoder(DType::F32, &Device::Cpu).unwrap()
}

/// The second block with the matrices of the first.
fn folded(decoder: &Decoder) -> Decoder {
    let mut blocks = decoder.blocks().to_vec();
    blocks[1].weights = Arc::clone(&blocks[0].weights);
    decoder.of_blocks(blocks)
}

fn losses() -> Losses {
    Losses { cross_entropy: 0.7, divergence: 0.5, temperature: 2.0, tail: 3.0, tail_blocks: 2 }
}

/// Two rows of tokens, and what follows each.
fn text(decoder: &Decoder) -> (Tensor, Vec<u32>) {
    let vocab = decoder.architecture().vocab_size as u32;
    let tokens: Vec<u32> = (0..26).map(|i| (i * i * 7 + 3) % vocab).collect();
    let rows = [&tokens[..12], &tokens[13..25]].concat();
    let targets = [&tokens[1..13], &tokens[14..]].concat();
    (Tensor::from_vec(rows, (2, 12), &Device::Cpu).unwrap(), targets)
}

fn walked(student: &Student, teacher: &Decoder, losses: &Losses) -> crate::Result<(Terms, Vec<Tensor>)> {
    let uses = Uses::of(student);
    let (ids, targets) = text(teacher);
    let backward = Backward { student, uses: &uses, losses, weight: 1.0 / targets.len() as f64 };
    let mut gradients = Gradients::none(student.trained.len());
    let lesson = Teacher::Model(teacher).lesson(losses, &[0, 1], &ids)?;
    let terms = backward.accumulate((&ids, &targets), &lesson, &mut gradients)?;
    Ok((terms.per(targets.len()), gradients.complete(student)?))
}

/// The loss, and its gradients, by one graph of primitives.
fn whole_graph(student: &Student, teacher: &Decoder, losses: &Losses) -> (f64, Vec<Tensor>) {
    let (ids, targets) = text(teacher);
    let tracked = student.tracked.clone().with_kernels(Kernels::Primitive);
    let teacher = teacher.clone().with_kernels(Kernels::Primitive);
    let (states, expected) = (tracked.hidden_states(&ids).unwrap(), teacher.hidden_states(&ids).unwrap());
    let rows = targets.len() as f64;
    let logits = |decoder: &Decoder, states: &[Tensor]| {
        decoder.logits(&states.last().unwrap().flatten_to(1).unwrap()).unwrap()
    };
    let (found, soft) = (logits(&tracked, &states), logits(&teacher, &expected));
    let chosen = Tensor::from_slice(&targets, (targets.len(), 1), &Device::Cpu).unwrap();
    let hard = log_softmax(&found, D::Minus1).unwrap().gather(&chosen, 1).unwrap().sum_all().unwrap();
    let at = |logits: &Tensor| log_softmax(&(logits / losses.temperature).unwrap(), D::Minus1).unwrap();
    let kl = (at(&soft).exp().unwrap() * (at(&soft) - at(&found)).unwrap()).unwrap().sum_all().unwrap();
    let square = losses.temperature * losses.temperature;
    let mut total =
        ((hard * -losses.cross_entropy).unwrap() + (kl * (losses.divergence * square)).unwrap()).unwrap();
    for (student, teacher) in states.iter().rev().zip(expected.iter().rev()).take(losses.tail_blocks) {
        let distance = (student - teacher).unwrap().sqr().unwrap().sum(D::Minus1).unwrap();
        let ratios = (distance / teacher.sqr().unwrap().sum(D::Minus1).unwrap()).unwrap().sum_all().unwrap();
        total = (total + (ratios * (losses.tail / losses.tail_blocks as f64)).unwrap()).unwrap();
    }
    let total = (total / rows).unwrap();
    let gradients = total.backward().unwrap();
    let gradient = |place: &super::trainable::Trained| gradients.get(&place.var).unwrap().clone();
    (f64::from(total.to_scalar::<f32>().unwrap()), student.trained.iter().map(gradient).collect())
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
}

/// Every gradient is within 1e-4 of what is expected. A gradient that is 0 but for rounding, as that of a key's bias
/// is, is held to a thousandth of the largest one.
fn assert_close(name: &str, student: &Student, found: &[Tensor], expected: &[Tensor]) {
    let floor = expected.iter().map(largest).fold(0.0, f32::max) * 1e-3;
    for ((trained, found), expected) in student.trained.iter().zip(found).zip(expected) {
        let off = largest(&(found - expected).unwrap()) / largest(expected).max(floor);
        assert!(off < 1e-4, "{name}, {}: off by {off}", trained.param);
    }
}

/// A `B` of zeros would hide the gradient of its `A`.
fn move_values(student: &Student) {
    for (place, trained) in student.trained.iter().enumerate() {
        let moved = (0..trained.var.elem_count()).map(|i| ((i * 7 + place) % 11) as f32 * 1e-2 - 0.05);
        let moved = Tensor::from_iter(moved, &Device::Cpu).unwrap().reshape(trained.var.shape()).unwrap();
        trained.var.set(&(trained.var.as_tensor() + moved).unwrap()).unwrap();
    }
}

#[test]
fn gradients_of_everything_are_those_of_the_whole_graph() {
    for family in FAMILIES {
        let dense = load(family);
        let lora = Lora { rank: 2, ..Lora::default() };
        let groups = [Trainable::Lora(lora), Trainable::Scales, Trainable::Everything];
        let groups: Vec<ParamGroup> =
            groups.into_iter().map(|params| ParamGroup::new(params, 1e-3)).collect();
        let cut = dense.with_blocks(&[0, 2, 3]).unwrap();
        for student in [&dense, &folded(&dense), &cut] {
            let student = Student::new(student, &groups, 1).unwrap();
            move_values(&student);
            let (terms, found) = walked(&student, &dense, &losses()).unwrap();
            let (loss, expected) = whole_graph(&student, &dense, &losses());
            let total = losses().total(terms);
            assert!((total - loss).abs() < 1e-4 * loss, "{family}: loss {total}, expected {loss}");
            assert_close(family, &student, &found, &expected);
        }
    }
}

#[test]
fn gradients_of_parts_are_those_of_the_whole_graph() {
    // With a norm after the MLP, without, and with biases.
    for family in ["gemma2", "llama", "gpt2"] {
        let dense = load(family);
        let folded = folded(&dense);
        let parts = [
            Trainable::Norms,
            Trainable::Scales,
            Trainable::Lora(Lora { rank: 2, shared: true, ..Lora::default() }),
            Trainable::Lora(Lora { rank: 2, shared: false, ..Lora::default() }),
            Trainable::SharedMatrices,
            Trainable::Matrices,
            Trainable::LastBlocks(1),
            Trainable::Head,
        ];
        for part in parts {
            let student = Student::new(&folded, &[ParamGroup::new(part.clone(), 1e-3)], 1).unwrap();
            move_values(&student);
            let (_, found) = walked(&student, &dense, &losses()).unwrap();
            let (_, expected) = whole_graph(&student, &dense, &losses());
            assert_close(&format!("{family}, {part:?}"), &student, &found, &expected);
        }
    }
}

#[test]
fn frozen_scales_are_passed_on_the_way_back() {
    for family in ["llama", "gpt2"] {
        let dense = load(family);
        let width = dense.architecture().hidden_size;
        let scale = Tensor::from_iter((0..width).map(|i| 0.5 + i as f32 * 0.02), &Device::Cpu).unwrap();
        let adapter = Adapter::new(Some(scale), None);
        let scaled = dense.with_adapter(1, Projection::Down, adapter).unwrap();
        let lora = Trainable::Lora(Lora { rank: 2, ..Lora::default() });
        let student = Student::new(&scaled, &[ParamGroup::new(lora, 1e-3)], 1).unwrap();
        move_values(&student);
        let (_, found) = walked(&student, &dense, &losses()).unwrap();
        let (_, expected) = whole_graph(&student, &dense, &losses());
        assert_close(family, &student, &found, &expected);
    }
}

#[test]
fn an_input_that_nobody_asks_for_changes_no_gradient() {
    let dense = load("llama");
    let lora = Trainable::Lora(Lora { rank: 2, ..Lora::default() });
    for params in [lora, Trainable::Norms, Trainable::Matrices] {
        let student = Student::new(&dense, &[ParamGroup::new(params, 1e-3)], 1).unwrap();
        let (ids, _) = text(&dense);
        let pass = student.tracked.pass(0, 12).unwrap();
        let x = student.plain.embed(&ids, &pass).unwrap();
        let upstream = (&x * 0.5).unwrap();
        let vars = || student.trained.iter().map(|trained| trained.var.as_tensor().clone());
        let vjp = |wants| student.tracked.block_vjp(0, (&x, wants), &upstream, vars(), &pass).unwrap();
        let ((through, with), (none, without)) = (vjp(true), vjp(false));
        assert!(through.is_some() && none.is_none());
        let bits = |gradient: Option<Tensor>| {
            let values = gradient.map(|gradient| gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            values.map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        assert!(with.iter().any(Option::is_some));
        for (with, without) in with.into_iter().zip(without) {
            assert_eq!(bits(with), bits(without));
        }
    }
}

#[test]
fn what_no_loss_depends_on_is_an_error_that_names_it() {
    let dense = load("llama");
    let only_tail = Losses { cross_entropy: 0.0, divergence: 0.0, ..losses() };
    let student = Student::new(&dense, &[ParamGroup::new(Trainable::Norms, 1e-3)], 1).unwrap();
    let error = walked(&student, &dense, &only_tail).unwrap_err();
    assert!(matches!(&error, Error::NoGradient { tensor } if tensor == "final norm gain"), "{error}");
}

#[test]
fn a_group_that_has_nothing_to_train_is_refused() {
    let dense = load("llama");
    for params in [Trainable::Residuals, Trainable::SharedMatrices, Trainable::LastBlocks(0)] {
        let error = Student::new(&dense, &[ParamGroup::new(params, 1e-3)], 1).unwrap_err().to_string();
        assert!(error.starts_with("trainable is "), "{error}");
    }
    for count in [dense.depth() + 1, usize::MAX] {
        let group = ParamGroup::new(Trainable::LastBlocks(count), 1e-3);
        let error = Student::new(&dense, &[group], 1).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("last blocks is {count}, expected at most the {} of the model", dense.depth())
        );
    }
    let twice = [ParamGroup::new(Trainable::Norms, 1e-3), ParamGroup::new(Trainable::Norms, 1e-4)];
    assert!(Student::new(&dense, &twice, 1).is_err());
}
