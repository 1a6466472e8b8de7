//! Every family against what transformers computes on the same checkpoint; both paths against each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use foldgpt::Windows;
use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::ops::Kernels;
use support::{FAMILIES, distance, expected, fixture, input_ids, load, open};

const TRANSFORMERS: f32 = 1e-4;
const PATHS: f32 = 1e-5;

#[test]
fn logits_and_hidden_states_are_those_of_transformers() {
    for family in FAMILIES {
        let (expected, ids) = (expected(family), input_ids(family));
        for kernels in [Kernels::Fused, Kernels::Primitive] {
            let decoder = load(family).with_kernels(kernels);
            let logits = decoder.forward(&ids).unwrap();
            let off = distance(&logits, &expected["logits"]);
            assert!(off < TRANSFORMERS, "{family} {kernels:?}: logits off by {off}");
            let states = decoder.hidden_states(&ids).unwrap();
            assert_eq!(states.len(), decoder.depth() + 1);
            for (index, state) in states.iter().enumerate() {
                let off = distance(state, &expected[&format!("hidden.{index}")]);
                assert!(off < TRANSFORMERS, "{family} {kernels:?}: hidden.{index} off by {off}");
            }
        }
    }
}

#[test]
fn both_paths_agree() {
    for family in FAMILIES {
        let (decoder, ids) = (load(family), input_ids(family));
        let fused = decoder.forward(&ids).unwrap();
        let primitive = decoder.with_kernels(Kernels::Primitive).forward(&ids).unwrap();
        let off = distance(&fused, &primitive);
        assert!(off < PATHS, "{family}: paths differ by {off}");
    }
}

#[test]
fn decoding_token_by_token_gives_the_logits_of_one_forward() {
    for family in FAMILIES {
        let (decoder, ids) = (load(family), input_ids(family));
        let first = ids.narrow(0, 0, 1).unwrap();
        for (ids, piece) in [(&ids, 1), (&ids, 7), (&first, 1)] {
            let whole = decoder.forward(ids).unwrap();
            let mut cache = decoder.cache();
            let seq = ids.dim(1).unwrap();
            let states: Vec<Tensor> = (0..seq)
                .step_by(piece)
                .map(|start| {
                    let ids = ids.narrow(1, start, piece.min(seq - start)).unwrap();
                    decoder.extend(&ids, &mut cache).unwrap()
                })
                .collect();
            let logits = decoder.logits(&Tensor::cat(&states, 1).unwrap()).unwrap();
            let off = distance(&logits, &whole);
            assert!(off < PATHS, "{family}: pieces of {piece} differ by {off}");
        }
    }
}

#[test]
fn a_truncated_cache_reads_on_as_if_the_rest_had_not_been() {
    for family in FAMILIES {
        let (decoder, ids) = (load(family), input_ids(family));
        let mut cache = decoder.cache();
        decoder.extend(&ids, &mut cache).unwrap();
        cache.truncate(5);
        let rest = ids.narrow(1, 5, 9).unwrap();
        let again = decoder.logits(&decoder.extend(&rest, &mut cache).unwrap()).unwrap();
        let whole = decoder.forward(&ids).unwrap().narrow(1, 5, 9).unwrap();
        assert!(distance(&again, &whole) < PATHS, "{family}");
        assert_eq!(cache.len(), 14);
    }
}

#[test]
fn loss_is_that_of_transformers() {
    for family in FAMILIES {
        let json = std::fs::read_to_string(fixture(family).join("expected.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let ids = input_ids(family).to_vec2::<u32>().unwrap();
        let windows = Windows::from_ids(ids).unwrap();
        for kernels in [Kernels::Fused, Kernels::Primitive] {
            let decoder = load(family).with_kernels(kernels);
            let found = foldgpt::perplexity(&decoder, &windows, &mut ()).unwrap().mean_nll;
            let expected = json["mean_nll"].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-4 * expected, "{family}: {found}, expected {expected}");
        }
    }
}

#[test]
fn a_skipped_block_is_an_absent_block() {
    for family in FAMILIES {
        let (decoder, ids) = (load(family), input_ids(family));
        let skipped = decoder.forward_skipping(&ids, &[1]).unwrap();
        let absent = decoder.with_blocks(&[0, 2, 3]).unwrap().forward(&ids).unwrap();
        assert!(distance(&skipped, &absent) == 0.0, "{family}");
        let whole = decoder.forward(&ids).unwrap();
        assert!(distance(&skipped, &whole) > 1e-3, "{family}: block 1 does nothing");
    }
}

#[test]
fn a_cache_that_refused_tokens_goes_on_as_before() {
    let (decoder, ids) = (load("llama"), input_ids("llama"));
    let row = |range: std::ops::Range<usize>| {
        ids.narrow(0, 0, 1).unwrap().narrow(1, range.start, range.len()).unwrap()
    };
    let mut cache = decoder.cache();
    decoder.extend(&row(0..5), &mut cache).unwrap();
    assert!(decoder.extend(&ids.narrow(1, 5, 2).unwrap(), &mut cache).is_err(), "another batch");
    assert!(load("qwen3").extend(&row(5..7), &mut cache).is_err(), "another model");
    let outside = Tensor::new(&[[5000u32]], ids.device()).unwrap();
    assert!(decoder.extend(&outside, &mut cache).is_err(), "no such token");
    assert_eq!(cache.len(), 5);
    let rest = decoder.extend(&row(5..20), &mut cache).unwrap();
    let whole = decoder.hidden(&row(0..20)).unwrap().narrow(1, 5, 15).unwrap();
    assert!(distance(&rest, &whole) < PATHS);
}

/// bf16 keeps 8 bits of a value: each product is off by some thousandths, which four blocks add up.
const BF16: f32 = 0.03;

#[test]
fn matrices_in_bf16_change_results_by_no_more_than_their_rounding() {
    for family in FAMILIES {
        let ids = input_ids(family);
        let narrow = open(family).decoder(DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(narrow.dtype(), DType::BF16);
        // The same rounded matrices, computed with in f32.
        let wide = narrow.to_dtype(DType::F32).unwrap().forward(&ids).unwrap();
        for kernels in [Kernels::Fused, Kernels::Primitive] {
            let logits = narrow.clone().with_kernels(kernels).forward(&ids).unwrap();
            assert_eq!(logits.dtype(), DType::F32);
            let off = distance(&logits, &wide);
            assert!(off < BF16, "{family} {kernels:?}: logits off by {off}");
        }
    }
}
