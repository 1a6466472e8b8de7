//! Writes what `tests/interop/check.py` loads with transformers. Run on purpose: `-- --ignored`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashMap;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor};
use foldgpt::{Checkpoint, SaveOptions};
use support::{FAMILIES, input_ids, load, open};

#[test]
#[ignore = "writes to target/interop for a script"]
fn export() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/interop");
    let _ = std::fs::remove_dir_all(&root);
    for family in FAMILIES {
        for kept in [&[0, 1, 2, 3][..], &[1, 2, 3], &[0, 3]] {
            let name: String = kept.iter().map(ToString::to_string).collect();
            let directory = root.join(format!("{family}-{name}"));
            let cut = load(family).with_blocks(kept).unwrap();
            let options = SaveOptions::default();
            open(family).save(&cut, None, directory.join("model"), &options, &mut ()).unwrap();
            let ids = input_ids(family);
            let tensors = HashMap::from([
                ("logits", cut.forward(&ids).unwrap()),
                ("input_ids", ids.to_dtype(DType::I64).unwrap()),
            ]);
            foldgpt::candle::safetensors::save(&tensors, directory.join("expected.safetensors")).unwrap();
        }
    }
    // The embedded model has a tokenizer, and is stored as bf16.
    let tiny = Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories")).unwrap();
    let decoder =
        tiny.decoder(DType::F32, &Device::Cpu).unwrap().with_blocks(&[0, 2, 3, 5, 6, 8, 9, 10, 11]).unwrap();
    let directory = root.join("tiny-stories");
    tiny.save(&decoder, None, directory.join("model"), &SaveOptions::default(), &mut ()).unwrap();
    let ids = Tensor::from_vec((1..41u32).collect::<Vec<_>>(), (1, 40), &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        ("logits", decoder.forward(&ids).unwrap()),
        ("input_ids", ids.to_dtype(DType::I64).unwrap()),
    ]);
    foldgpt::candle::safetensors::save(&tensors, directory.join("expected.safetensors")).unwrap();
}
