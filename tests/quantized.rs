//! Quantised decoders: how exact they are, what they share and take, and what they refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashSet;
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use foldgpt::candle::quantized::{GgmlDType, QTensor};
use foldgpt::candle::{D, DType, Device, Tensor};
use foldgpt::heal::{Budget, Heal, Losses, Teacher};
use foldgpt::importance::{BlockInfluence, Coupling, Importance, PerplexityIncrease, Taylor};
use foldgpt::model::{Architecture, Part, Projection, Unit, Walk};
use foldgpt::ops::{Kernels, Matrix};
use foldgpt::plan::{Donor, Groups};
use foldgpt::{
    Account, Bos, Checkpoint, Decoder, Error, Generate, Observer, Plan, SaveOptions, Windows, fold,
    perplexity,
};
use support::{FAMILIES, adapted, distance, input_ids, load, values};

/// The embedded model, whose rows are multiples of 32.
fn stories() -> (Checkpoint, Decoder) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    let checkpoint = Checkpoint::open(directory).unwrap();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    (checkpoint, decoder)
}

/// A model whose rows are multiples of 256, but for those of the MLP's way down, which are multiples of 32.
fn wide() -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
    });
    Decoder::random(Architecture::from_config(&config).unwrap(), 0, DType::F32, &Device::Cpu).unwrap()
}

fn quantized(decoder: &Decoder, dtype: GgmlDType) -> Decoder {
    decoder.quantized(dtype, &mut ()).unwrap()
}

fn some_ids(tokens: u32) -> Tensor {
    let ids: Vec<u32> = (0..tokens).map(|place| (place * place * 7 + 3 * place) % 300).collect();
    Tensor::from_vec(ids, (1, tokens as usize), &Device::Cpu).unwrap()
}

fn windows(checkpoint: &Checkpoint) -> Windows {
    let text = "Anna lost her red kite near the old bridge. Ben found it, and they flew it home. ".repeat(40);
    Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 160, Some(2), Bos::Auto).unwrap()
}

/// The first window, and the same as a batch of one.
fn first(windows: &Windows) -> (&[u32], Tensor) {
    let window = windows.iter().next().unwrap();
    (window, Tensor::from_slice(window, (1, window.len()), &Device::Cpu).unwrap())
}

fn blocks_of(weight: &Tensor, dtype: GgmlDType) -> Matrix {
    Matrix::Quantized(Arc::new(QTensor::quantize(weight, dtype).unwrap()))
}

#[test]
fn a_product_is_off_by_the_rounding_of_its_inputs_and_no_more() {
    // From 16 rows on, inputs and blocks are rounded to bf16, which is off by less. Of fewer rows,
    // inputs are rounded to steps of a 127th of a block's largest, and the factor of a block of 32 to f16: half a step,
    // and 2⁻¹¹ of at most 127 steps, for each input.
    const STEPS: f32 = 0.5 + 127.0 / 2048.0 + 0.01;
    use GgmlDType::{Q4_0, Q4K, Q5K, Q6K, Q8_0};
    for dtype in [Q4_0, Q8_0, Q4K, Q5K, Q6K] {
        // Outputs that do and do not fill tiles of 16; rows few and many.
        for (rows, inputs, outputs) in [(1, 256, 48), (3, 512, 50), (40, 256, 64), (2, 96, 33)] {
            if inputs % dtype.block_size() != 0 {
                continue;
            }
            let (weight, bias) = (values(&[outputs, inputs], 1), values(&[outputs], 3));
            let weight = blocks_of(&weight, dtype);
            let x = values(&[1, rows, inputs], 2);
            let product = |kernels: Kernels| {
                let y = kernels.linear(&x, &weight, Some(&bias)).unwrap();
                y.squeeze(0).unwrap().to_vec2::<f32>().unwrap()
            };
            let (found, exact) = (product(Kernels::Fused), product(Kernels::Primitive));
            let largest = x.squeeze(0).unwrap().abs().unwrap().max(D::Minus1).unwrap();
            let largest = largest.to_vec1::<f32>().unwrap();
            let sums = weight.widened(DType::F32).unwrap().abs().unwrap().sum(D::Minus1).unwrap();
            let sums = sums.to_vec1::<f32>().unwrap();
            for ((found, exact), largest) in found.iter().zip(&exact).zip(largest) {
                for ((found, exact), sum) in found.iter().zip(exact).zip(&sums) {
                    let (off, limit) = ((found - exact).abs(), STEPS * largest / 127.0 * sum);
                    assert!(off <= limit, "{dtype:?} ({rows}, {inputs}, {outputs}): {off}, limit {limit}");
                }
            }
        }
    }
}

/// How far logits may be from those of the dequantised matrices, as a share of the largest logit. What differs is the
/// rounding of inputs to 8 bits: a relative error of half a percent or so for each product (the largest of 32 numbers is
/// two to three times their root mean square, and a step's error a third of it), which blocks add up at random. Twice
/// the most that was found, 0.021.
const LOGITS: f32 = 0.04;

#[test]
fn logits_are_those_of_the_dequantised_matrices_but_for_rounded_inputs() {
    let ids = some_ids(40);
    let (_, dense) = stories();
    let mut cases = vec![("stories", dense, GgmlDType::Q8_0), ("wide", wide(), GgmlDType::Q8_0)];
    cases.extend([GgmlDType::Q4K, GgmlDType::Q6K].map(|dtype| ("wide", wide(), dtype)));
    for (name, dense, dtype) in cases {
        let narrow = quantized(&dense, dtype);
        let exact = narrow.to_dtype(DType::F32).unwrap();
        assert_eq!(exact.matrix_types(), "f32");
        let (found, expected) = (narrow.forward(&ids).unwrap(), exact.forward(&ids).unwrap());
        let off = distance(&found, &expected);
        assert!(off < LOGITS, "{name} {dtype:?}: off by {off}");
        assert!(off > 0.0, "{name} {dtype:?}: nothing is quantised");
        if dtype == GgmlDType::Q8_0 {
            // Matrices in 8 bits are as close to the original ones as inputs are.
            let off = distance(&exact.forward(&ids).unwrap(), &dense.forward(&ids).unwrap());
            assert!(off < LOGITS, "{name}: matrices off by {off}");
        }
        // Under the primitives the same decoder computes with what its blocks stand for.
        let primitive = narrow.with_kernels(Kernels::Primitive).forward(&ids).unwrap();
        assert!(distance(&primitive, &expected) < 1e-5, "{name} {dtype:?}");
    }
}

#[test]
fn rows_that_do_not_fill_blocks_are_held_in_a_type_that_they_fill() {
    use Projection::{Down, Up};
    let narrow = quantized(&wide(), GgmlDType::Q4K);
    assert_eq!(narrow.matrix_types(), "q4_k+q8_0");
    let kind = |at| narrow.blocks()[1].weights.get(at).unwrap().type_name();
    assert_eq!([kind(Up), kind(Down)], ["q4_k", "q8_0"]);
    assert_eq!(quantized(&wide(), GgmlDType::Q8_0).matrix_types(), "q8_0");
    // Rows of 48 fill no blocks, those of four heads of 16 do; what fits none stays, in its own type.
    for (dtype, rest) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let narrow = quantized(&load("gemma").to_dtype(dtype).unwrap(), GgmlDType::Q4K);
        assert_eq!(narrow.matrix_types(), format!("{rest}+q8_0"));
        let params: Vec<String> = narrow.quantized_matrices().map(|(param, _)| param.to_string()).collect();
        assert_eq!(params, (0..4).map(|depth| format!("block {depth} o_proj weight")).collect::<Vec<_>>());
    }
    // And whatever the family, the result computes.
    for family in FAMILIES {
        let (dense, ids) = (load(family), input_ids(family));
        let narrow = quantized(&adapted(&dense), GgmlDType::Q8_0);
        let exact = narrow.to_dtype(DType::F32).unwrap();
        let off = distance(&narrow.forward(&ids).unwrap(), &exact.forward(&ids).unwrap());
        assert!(off < LOGITS, "{family}: off by {off}");
    }
}

#[test]
fn a_view_is_quantised_and_not_what_it_is_a_view_of() {
    let dense = wide();
    let views = dense.map(|_, value| {
        let rows = value.dim(0)?;
        Ok(Tensor::cat(&[&value.zeros_like()?, value, value], 0)?.narrow(0, rows, rows)?)
    });
    let encoded = |decoder: &Decoder| -> Vec<Vec<u8>> {
        let narrow = quantized(decoder, GgmlDType::Q4K);
        narrow.quantized_matrices().map(|(_, blocks)| blocks.data().unwrap().into_owned()).collect()
    };
    assert!(encoded(&views.unwrap()) == encoded(&dense));
}

#[test]
fn what_depths_share_is_quantised_once_and_stays_shared() {
    let (_, dense) = stories();
    let plan = Plan::builder().share(Groups::of(2)).donor(Donor::First).build(dense.architecture()).unwrap();
    let folded = fold(&dense, &plan).unwrap();
    let narrow = quantized(&folded, GgmlDType::Q8_0);
    assert_eq!(narrow.architecture(), folded.architecture());
    assert_eq!(narrow.parameter_count(), folded.parameter_count());
    assert_eq!(narrow.stored_dtype(), folded.stored_dtype());
    for pair in narrow.blocks().chunks(2) {
        assert!(Arc::ptr_eq(&pair[0].weights, &pair[1].weights));
    }
    let distinct = |decoder: &Decoder| -> usize {
        let of_blocks = decoder.blocks().iter().flat_map(|block| {
            let of = move |at| block.weights.get(at).and_then(Matrix::as_quantized).map(Arc::as_ptr);
            Projection::ALL.into_iter().filter_map(of)
        });
        of_blocks.collect::<HashSet<_>>().len()
    };
    // Seven matrices for each pair; the embedding, tied to the head, is one more.
    let depth = dense.depth();
    assert_eq!(distinct(&narrow), 7 * depth / 2);
    assert_eq!(narrow.quantized_matrices().count(), 7 * depth / 2 + 1);
    // Half a block without the other shares what is left of it.
    let cut = narrow.without(&[Unit { block: 1, part: Part::Mlp }]).unwrap();
    assert_eq!(distinct(&cut), 7 * depth / 2);
    // Quantised after folding or folded after quantising: the same blocks.
    let folded_after = fold(&quantized(&dense, GgmlDType::Q8_0), &plan).unwrap();
    let ids = some_ids(12);
    assert!(distance(&folded_after.forward(&ids).unwrap(), &narrow.forward(&ids).unwrap()) <= 0.0);
    // And back again.
    let back = narrow.to_dtype(DType::F32).unwrap();
    assert_eq!(back.architecture(), folded.architecture());
    assert_eq!(back.tensors().count(), folded.tensors().count());
}

#[test]
fn bytes_are_those_of_the_blocks_and_of_the_tensors_that_are_left() {
    for (dense, dtype) in
        [(stories().1, GgmlDType::Q8_0), (wide(), GgmlDType::Q8_0), (wide(), GgmlDType::Q4K)]
    {
        let narrow = quantized(&dense, dtype);
        let blocks: usize =
            narrow.quantized_matrices().map(|(_, blocks)| blocks.storage_size_in_bytes()).sum();
        let numbers = |kind| -> usize {
            let of = narrow.quantized_matrices().filter(|(_, blocks)| blocks.dtype() == kind);
            of.map(|(_, blocks)| blocks.shape().elem_count()).sum()
        };
        // 8 bits and a factor of 16 for 32 numbers; 4 bits, and 256 for 256 numbers: factors of factors and offsets.
        assert_eq!(blocks, numbers(GgmlDType::Q8_0) * 34 / 32 + numbers(GgmlDType::Q4K) * 144 / 256);
        let tensors: usize = narrow.tensors().map(|tensor| 4 * tensor.elem_count()).sum();
        let account = Account::counted(&narrow, 64).unwrap();
        assert_eq!(account.resident_bytes, (blocks + tensors) as u64, "{dtype:?}");
        // Nothing else changes.
        let of_dense = Account::counted(&dense, 64).unwrap();
        assert_eq!(account.parameters, of_dense.parameters);
        assert_eq!(account.stored_bytes, of_dense.stored_bytes);
        assert_eq!(account.flops_per_token, of_dense.flops_per_token);
        assert_eq!(account.kv_bytes_per_token, of_dense.kv_bytes_per_token);
    }
}

#[test]
fn rows_of_the_embedding_are_dequantised_when_they_are_looked_up() {
    let (_, dense) = stories();
    let narrow = quantized(&dense, GgmlDType::Q8_0);
    let exact = narrow.to_dtype(DType::F32).unwrap();
    let ids = some_ids(30);
    let embedded = |decoder: &Decoder| {
        let pass = decoder.pass(0, 30).unwrap();
        decoder.embed(&ids, &pass).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(embedded(&narrow), embedded(&exact));
    let beyond = Tensor::new(&[[dense.architecture().vocab_size as u32]], &Device::Cpu).unwrap();
    assert!(narrow.forward(&beyond).is_err());
}

#[test]
fn reading_in_pieces_gives_what_reading_at_once_gives() {
    let ids = some_ids(40);
    for (decoder, dtype) in
        [(stories().1, GgmlDType::Q8_0), (wide(), GgmlDType::Q8_0), (wide(), GgmlDType::Q4K)]
    {
        let narrow = quantized(&decoder, dtype);
        let (mut cache, mut states, mut read) = (narrow.cache(), Vec::new(), 0);
        for piece in [35, 1, 1, 2, 1] {
            states.push(narrow.extend(&ids.narrow(1, read, piece).unwrap(), &mut cache).unwrap());
            read += piece;
        }
        let found = narrow.logits(&Tensor::cat(&states, 1).unwrap()).unwrap();
        // Sums in another order may round an input to the next step: as far off as rounding is at all, at most.
        let off = distance(&found, &narrow.forward(&ids).unwrap());
        assert!(off < LOGITS, "{dtype:?}: off by {off}");
    }
}

#[test]
fn losses_are_those_of_the_logits() {
    let (checkpoint, dense) = stories();
    let narrow = quantized(&dense, GgmlDType::Q8_0);
    let windows = windows(&checkpoint);
    let (window, ids) = first(&windows);
    let hidden = narrow.hidden(&ids).unwrap().squeeze(0).unwrap();
    let targets = &window[1..];
    let rows = hidden.narrow(0, 0, targets.len()).unwrap();
    // More rows than have their logits at once.
    let found = narrow.nll(&rows, targets).unwrap();
    let log = candle_nn::ops::log_softmax(&narrow.logits(&rows).unwrap(), D::Minus1).unwrap();
    let places = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu).unwrap();
    let expected = log.gather(&places, 1).unwrap().squeeze(1).unwrap().neg().unwrap();
    assert!(distance(&found, &expected) < 1e-5);
}

#[test]
fn what_needs_no_gradient_works() {
    let (checkpoint, dense) = stories();
    let narrow = quantized(&dense, GgmlDType::Q8_0);
    let windows = windows(&checkpoint);
    let nll = |decoder: &Decoder| perplexity(decoder, &windows, &mut ()).unwrap().mean_nll;
    assert!((nll(&narrow) - nll(&dense)).abs() < 0.02, "{} and {}", nll(&narrow), nll(&dense));
    let influence = |decoder: &Decoder| {
        let scores = BlockInfluence::default().score(decoder, &windows, &mut ()).unwrap();
        scores.blocks.into_iter().map(|block| block.importance)
    };
    for (narrow, dense) in influence(&narrow).zip(influence(&dense)) {
        assert!((narrow - dense).abs() < 0.02, "{narrow} and {dense}");
    }
    assert!(PerplexityIncrease::default().score(&narrow, &windows, &mut ()).is_ok());
    let options = Generate { max_tokens: 12, ..Generate::default() };
    let tokenizer = checkpoint.tokenizer().unwrap();
    let made = || options.run(&narrow, &tokenizer, "One day", |_| ControlFlow::Continue(())).unwrap();
    let first = made();
    assert_eq!(first.len(), 12);
    assert_eq!(first, made());
}

fn refuses<T: Debug>(result: foldgpt::Result<T>) {
    match result {
        Err(error @ Error::Quantized { .. }) => assert!(error.to_string().contains("q8_0")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_done_with_blocks_is_refused() {
    let (checkpoint, dense) = stories();
    let narrow = quantized(&dense, GgmlDType::Q8_0);
    let windows = windows(&checkpoint);
    let units = Unit::blocks(dense.depth());
    let (window, ids) = first(&windows);
    refuses(Walk::forward(&narrow, &units, &vec![1.0; units.len()], &ids));
    refuses(narrow.loss_vjp(&dense.hidden(&ids).unwrap(), &window[1..]));
    refuses(Taylor::default().score(&narrow, &windows, &mut ()));
    refuses(Coupling::from_gate_gradients(&narrow, &windows, &units, &mut ()));
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.micro_batch) = (Budget::Steps(1), 2, 1);
    refuses(heal.run(&narrow, &windows, None, None, &mut ()));
    heal.losses = Losses::logits();
    refuses(heal.run(&dense, &windows, None, Some(Teacher::Model(&narrow)), &mut ()));
    let plan = Plan::builder().share(Groups::of(2)).donor(Donor::Mean).build(dense.architecture()).unwrap();
    refuses(fold(&narrow, &plan));
    refuses(adapted(&narrow).merge_adapters());
    refuses(narrow.to_device(&Device::Cpu));
    refuses(narrow.quantized(GgmlDType::Q8_0, &mut ()));
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("out");
    refuses(checkpoint.save(&narrow, None, &directory, &SaveOptions::default(), &mut ()));
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let dense = wide();
    for dtype in [GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q5_0, GgmlDType::Q8_1, GgmlDType::Q8K] {
        let error = dense.quantized(dtype, &mut ()).unwrap_err();
        assert!(error.to_string().contains("q4_0, q8_0, q4_k, q5_k, q6_k"), "{error}");
    }
    let error = dense.to_dtype(DType::F64).unwrap().quantized(GgmlDType::Q8_0, &mut ()).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error}");
}

/// Stops after three matrices.
struct Three(u64);

impl Observer for Three {
    fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        assert_eq!((stage, total), ("quantize", 4 * 7 + 2));
        self.0 = done;
        if done >= 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn quantising_can_be_cancelled() {
    let mut observer = Three(0);
    let error = wide().quantized(GgmlDType::Q8_0, &mut observer).unwrap_err();
    assert!(matches!(error, Error::Cancelled { stage: "quantize" }));
    assert_eq!(observer.0, 3);
}
