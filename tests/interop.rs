//! Writes what `tests/interop/check.py` loads with transformers. Run on purpose: `-- --ignored`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::model::{Part, Unit};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{Bos, Checkpoint, Decoder, Plan, SaveOptions, Windows, fold_on};
use support::{FAMILIES, folded, input_ids, kinds, load, open};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/interop")
}

/// Saves a decoder, and beside it ids with the logits that it gives for them.
fn write(name: &str, checkpoint: &Checkpoint, decoder: &Decoder, ids: &Tensor) {
    let directory = root().join(name);
    checkpoint.save(decoder, None, directory.join("model"), &SaveOptions::default(), &mut ()).unwrap();
    let tensors = HashMap::from([
        ("logits", decoder.forward(ids).unwrap()),
        ("input_ids", ids.to_dtype(DType::I64).unwrap()),
    ]);
    foldgpt::candle::safetensors::save(&tensors, directory.join("expected.safetensors")).unwrap();
}

fn some_ids() -> Tensor {
    Tensor::from_vec((1..41u32).collect::<Vec<_>>(), (1, 40), &Device::Cpu).unwrap()
}

/// The model tied in pairs, with scales and residuals.
fn in_pairs(checkpoint: &Checkpoint, decoder: &Decoder) -> Decoder {
    let text = "Anna lost her red kite near the old bridge. ".repeat(40);
    let windows =
        Windows::from_text(&checkpoint.tokenizer().unwrap(), &text, 64, Some(2), Bos::Auto).unwrap();
    let plan = Plan::builder()
        .share(Groups::of(2))
        .donor(Donor::Mean)
        .scales(ScaleStart::LeastSquares)
        .residual(Ranks::Uniform(8), ResidualStart::Whitened)
        .build(decoder.architecture())
        .unwrap();
    fold_on(decoder, &plan, &windows, &mut ()).unwrap()
}

#[test]
#[ignore = "writes to target/interop for a script"]
fn export() {
    let _ = std::fs::remove_dir_all(root());
    for family in FAMILIES {
        for kept in [&[0, 1, 2, 3][..], &[1, 2, 3], &[0, 3]] {
            let name: String = kept.iter().map(ToString::to_string).collect();
            let cut = load(family).with_blocks(kept).unwrap();
            write(&format!("{family}-{name}"), &open(family), &cut, &input_ids(family));
        }
        // Zeros stand for the halves that blocks lost.
        let halves = [Unit { block: 0, part: Part::Mlp }, Unit { block: 3, part: Part::Attention }];
        let cut = load(family).without(&halves).unwrap();
        write(&format!("{family}-halves"), &open(family), &cut, &input_ids(family));
        for (name, plan) in kinds(family) {
            let name = format!("{family}-{}", name.replace([',', ' '], "-"));
            write(&name, &open(family), &folded(family, &plan), &input_ids(family));
        }
    }
    // The embedded model has a tokenizer, and is stored as bf16.
    let tiny = Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories")).unwrap();
    let dense = tiny.decoder(DType::F32, &Device::Cpu).unwrap();
    let cut = dense.with_blocks(&[0, 2, 3, 5, 6, 8, 9, 10, 11]).unwrap();
    write("tiny-stories", &tiny, &cut, &some_ids());
    write("tiny-stories-pairs", &tiny, &in_pairs(&tiny, &dense), &some_ids());
    // Any other model, where one is named.
    if let Some(model) = std::env::var_os("FOLDGPT_INTEROP_MODEL") {
        let checkpoint = Checkpoint::open(PathBuf::from(model)).unwrap();
        let dense = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
        write("named-pairs", &checkpoint, &in_pairs(&checkpoint, &dense), &some_ids());
    }
}
