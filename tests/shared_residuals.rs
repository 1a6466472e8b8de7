//! Residuals that depths share: stored once, counted once, and shared again where they are read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::HashSet;
use std::path::Path;

use foldgpt::candle::{DType, Device, Tensor, TensorId};
use foldgpt::heal::{Budget, Heal, Lora, ParamGroup, Trainable};
use foldgpt::model::{Adapter, AdapterShape, LowRank, Part, Projection, Unit};
use foldgpt::plan::{Donor, Groups, Ranks, ResidualStart, ScaleStart};
use foldgpt::{
    Account, Checkpoint, Decoder, Format, Held, Plan, SaveOptions, Scores, StreamOptions, Target, fold,
    fold_on, perplexity, perplexity_streamed,
};
use serde_json::{Value, json};
use support::{FAMILIES, folded, input_ids, kinds, load, open, values, windows};

/// The fixture with all blocks tied to their mean. Of the residuals of queries, that of depths 0 and 2 is one, and depth
/// 1 has its own; of all others, that of depths 1 and 3 is one, and depth 0 has its own. What is shared has scales.
fn tied(family: &str) -> Decoder {
    let dense = load(family);
    let plan = Plan::builder().share(Groups::of(4)).donor(Donor::Mean).build(dense.architecture()).unwrap();
    let mut decoder = fold(&dense, &plan).unwrap();
    for (place, projection) in Projection::ALL.into_iter().enumerate() {
        let Some((output, input)) = dense.architecture().projection_shape(projection) else { continue };
        let small =
            |shape: &[usize], seed: usize| (values(shape, (100 * place + seed) as u64) * 0.2).unwrap();
        let residual = |seed| LowRank { a: small(&[2, input], seed), b: small(&[output, 2], seed + 1) };
        let (lent, own) = (residual(1), residual(3));
        let (sharing, alone) = if projection == Projection::Q { ([0, 2], 1) } else { ([1, 3], 0) };
        for depth in sharing {
            let scale = (small(&[output], 5 + depth) + 1.0).unwrap();
            let adapter = Adapter::new(Some(scale), Some(lent.clone()));
            decoder = decoder.with_adapter(depth, projection, adapter).unwrap();
        }
        decoder = decoder.with_adapter(alone, projection, Adapter::new(None, Some(own))).unwrap();
    }
    decoder
}

fn shape(decoder: &Decoder, depth: usize, projection: Projection) -> AdapterShape {
    let block = decoder.architecture().fold.block(depth);
    block.adapters.get(&projection).copied().unwrap_or_default()
}

fn residual(decoder: &Decoder, depth: usize, projection: Projection) -> [TensorId; 2] {
    let residual = decoder.blocks()[depth].own.adapters[projection].low_rank.as_ref().unwrap();
    [residual.a.id(), residual.b.id()]
}

/// The numbers of all tensors, each once.
fn numbers(decoder: &Decoder) -> usize {
    decoder.tensors().map(Tensor::elem_count).sum()
}

fn save(checkpoint: &Checkpoint, decoder: &Decoder, directory: &Path) -> u64 {
    let compact = SaveOptions::from(Format::Compact);
    checkpoint.save(decoder, None, directory, &compact, &mut ()).unwrap().tensor_bytes
}

fn reload(directory: &Path) -> (Checkpoint, Decoder) {
    let checkpoint = Checkpoint::open(directory).unwrap();
    let decoder = checkpoint.decoder(DType::F32, &Device::Cpu).unwrap();
    (checkpoint, decoder)
}

fn logits(decoder: &Decoder, family: &str) -> Vec<u32> {
    let logits = decoder.forward(&input_ids(family)).unwrap();
    logits.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn what_is_shared_is_stored_and_counted_once_and_read_as_one() {
    for family in FAMILIES {
        let decoder = tied(family);
        let of = |depth, projection| shape(&decoder, depth, projection).residual_of;
        assert_eq!(
            [0, 1, 2, 3].map(|depth| of(depth, Projection::Q)),
            [None, None, Some(0), None],
            "{family}"
        );
        assert_eq!([0, 1, 2, 3].map(|depth| of(depth, Projection::Up)), [None, None, None, Some(1)]);
        assert_eq!(decoder.parameter_count(), numbers(&decoder), "{family}");
        let held = Held { stored: decoder.stored_types(), resident: DType::F32, context: 9 };
        let counted = Account::counted(&decoder, 9).unwrap();
        assert_eq!(Account::planned(decoder.architecture(), &held), counted, "{family}");
        assert_eq!(counted.parameters, numbers(&decoder));

        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("compact");
        assert_eq!(save(&open(family), &decoder, &directory), counted.stored_bytes, "{family}");
        let (_, reloaded) = reload(&directory);
        assert_eq!(reloaded.architecture(), decoder.architecture(), "{family}");
        assert_eq!(logits(&reloaded, family), logits(&decoder, family), "{family}");
        let same =
            |projection, a, b| residual(&reloaded, a, projection) == residual(&reloaded, b, projection);
        assert!(same(Projection::Q, 0, 2) && !same(Projection::Q, 0, 1), "{family}");
        assert!(same(Projection::Down, 1, 3) && !same(Projection::Down, 0, 1), "{family}");
        assert_eq!(numbers(&reloaded), numbers(&decoder), "{family}");
    }
}

#[test]
fn some_of_the_blocks_share_what_they_shared() {
    for family in ["llama", "gpt2", "phi3"] {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("compact");
        save(&open(family), &tied(family), &directory);
        let (checkpoint, decoder) = reload(&directory);
        let streamed = checkpoint.streamed(DType::F32, &Device::Cpu, StreamOptions::default()).unwrap();
        for kept in [&[0, 1, 2, 3][..], &[1, 2, 3], &[2, 3], &[3, 1], &[2, 0, 2], &[3]] {
            let cut = decoder.with_blocks(kept).unwrap();
            let from_shapes = checkpoint.architecture().with_blocks(kept).unwrap();
            assert_eq!(cut.architecture(), &from_shapes, "{family} {kept:?}");
            let (computed, copied) = (scratch.path().join("computed"), scratch.path().join("copied"));
            let bytes = save(&checkpoint, &cut, &computed);
            let compact = SaveOptions::from(Format::Compact);
            let by_copy = checkpoint.save_blocks(kept, None, &copied, &compact, &mut ()).unwrap();
            assert_eq!(by_copy.tensor_bytes, bytes, "{family} {kept:?}");
            for name in ["config.json", "foldgpt.safetensors"] {
                let read = |directory: &Path| std::fs::read(directory.join(name)).unwrap();
                assert!(read(&computed) == read(&copied), "{family} {kept:?}: {name}");
            }
            assert_eq!(logits(&reload(&copied).1, family), logits(&cut, family), "{family} {kept:?}");
            let less = streamed.with_blocks(kept).unwrap();
            assert_eq!(
                perplexity_streamed(&less, &windows(family), &mut ()).unwrap(),
                perplexity(&cut, &windows(family), &mut ()).unwrap(),
                "{family} {kept:?}"
            );
            std::fs::remove_dir_all(computed).unwrap();
            std::fs::remove_dir_all(copied).unwrap();
        }
        // A block that lost a half shares with none that has it.
        let half = decoder.without(&[Unit { block: 2, part: Part::Mlp }]).unwrap();
        assert_eq!(shape(&half, 2, Projection::Q).residual_of, None);
        assert_eq!(shape(&half, 3, Projection::O).residual_of, Some(1));
        let out = scratch.path().join("half");
        save(&checkpoint, &half, &out);
        assert_eq!(logits(&reload(&out).1, family), logits(&half, family), "{family}");
    }
}

#[test]
fn a_plan_knows_what_becomes_of_shared_residuals() {
    let (decoder, windows) = (tied("llama"), windows("llama"));
    let arch = decoder.architecture();
    let scores = |values: [f64; 4]| Scores::new("test", &windows, values.to_vec()).unwrap();
    let halves = vec![8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0];
    let halves = Scores::of_units("test", &windows, &Unit::halves(4), halves).unwrap();
    let group = |blocks: &[usize]| Plan::builder().share(Groups::Explicit(vec![blocks.to_vec()]));
    let builders = [
        Plan::builder().remove(Target::Blocks(1), &scores([0.1, 0.2, 0.3, 0.4])),
        Plan::builder().remove(Target::Blocks(2), &scores([0.1, 0.2, 0.3, 0.4])),
        Plan::builder().remove(Target::Blocks(1), &scores([0.4, 0.1, 0.3, 0.2])),
        Plan::builder().remove(Target::Blocks(1), &halves),
        Plan::builder().remove(Target::Blocks(2), &halves),
        group(&[0, 1]),
        group(&[2, 3]).donor(Donor::Mean).scales(ScaleStart::LeastSquares),
        group(&[0, 2]).residual(Ranks::Uniform(2), ResidualStart::Svd),
        group(&[1, 2, 3]).donor(Donor::Mean),
    ];
    for (place, builder) in builders.into_iter().enumerate() {
        let plan = builder.build(arch).unwrap();
        let folded = fold_on(&decoder, &plan, &windows, &mut ()).unwrap();
        assert_eq!(&plan.architecture(arch).unwrap(), folded.architecture(), "{place}");
    }
    // A number of blocks that is enough whichever they are is never less than a plan takes.
    let orders = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0], [3.0, 1.0, 4.0, 2.0]];
    let mut met = 0;
    for budget in (0..decoder.parameter_count()).rev().step_by(500) {
        let Ok(most) = Target::Parameters(budget).blocks(arch) else { break };
        for order in orders {
            let plan = Plan::new(arch, &scores(order), Target::Parameters(budget), &[]).unwrap();
            assert!(plan.removed().len() <= most, "{budget}: {:?}, at most {most}", plan.removed());
            met += plan.removed().len();
        }
    }
    assert!(met > 0);
}

fn heal(groups: Option<Vec<ParamGroup>>) -> Heal {
    let mut heal = Heal::default();
    (heal.budget, heal.batch) = (Budget::Steps(2), 2);
    heal.groups = groups.unwrap_or(heal.groups);
    heal
}

#[test]
fn adapters_that_healing_made_for_tied_blocks_are_stored_once() {
    for family in ["llama", "gpt2", "phi3"] {
        for (name, plan) in kinds(family) {
            let tied = folded(family, &plan);
            // The scales of each depth keep the adapters that depths share from becoming part of matrices.
            let healed = heal(None).run(&tied, &windows(family), None, None, &mut ()).unwrap().decoder;
            assert_eq!(healed.parameter_count(), numbers(&healed), "{family} {name}");
            let scratch = tempfile::tempdir().unwrap();
            let directory = scratch.path().join("healed");
            let bytes = save(&open(family), &healed, &directory);
            assert_eq!(bytes, Account::counted(&healed, 1).unwrap().stored_bytes, "{family} {name}");
            let (_, reloaded) = reload(&directory);
            assert_eq!(reloaded.architecture(), healed.architecture(), "{family} {name}");
            assert_eq!(numbers(&reloaded), numbers(&healed), "{family} {name}");
            assert_eq!(logits(&reloaded, family), logits(&healed, family), "{family} {name}");
        }
    }
}

#[test]
fn a_kept_adapter_of_a_group_is_one_on_disk_and_is_trained_as_one() {
    let dense = load("llama");
    let pairs = fold(&dense, &Plan::builder().share(Groups::of(2)).build(dense.architecture()).unwrap());
    let (pairs, windows) = (pairs.unwrap(), windows("llama"));
    let scratch = tempfile::tempdir().unwrap();
    let mut sizes = Vec::new();
    for shared in [true, false] {
        let mut lora = Lora::default();
        (lora.rank, lora.shared, lora.merge) = (2, shared, false);
        let groups = vec![ParamGroup::from(Trainable::Scales), Trainable::Lora(lora).into()];
        let healed = heal(Some(groups)).run(&pairs, &windows, None, None, &mut ()).unwrap().decoder;
        let expected = shared.then_some(2);
        assert_eq!(
            shape(&healed, 3, Projection::V),
            AdapterShape { scale: true, rank: 2, residual_of: expected }
        );
        let directory = scratch.path().join(format!("{shared}"));
        sizes.push(save(&open("llama"), &healed, &directory));
        let stored = foldgpt::candle::safetensors::load(directory.join("foldgpt.safetensors"), &Device::Cpu);
        let stored: HashSet<String> = stored.unwrap().into_keys().collect();
        assert!(stored.contains("model.layers.2.mlp.up_proj.lora_B.weight"));
        assert!(stored.contains("model.layers.3.mlp.up_proj.scale"));
        assert_eq!(stored.contains("model.layers.3.mlp.up_proj.lora_B.weight"), !shared);
        let (_, reloaded) = reload(&directory);
        let one = residual(&reloaded, 2, Projection::K) == residual(&reloaded, 3, Projection::K);
        assert_eq!(one, shared);
        assert_eq!(logits(&reloaded, "llama"), logits(&healed, "llama"));
        let further = heal(Some(vec![Trainable::Residuals.into()]));
        let further = further.run(&reloaded, &windows, None, None, &mut ()).unwrap();
        assert_eq!(further.decoder.architecture(), healed.architecture());
        let of =
            |at| dense.architecture().projection_shape(at).map_or(0, |(output, input)| 2 * (output + input));
        let each: usize = Projection::ALL.into_iter().map(of).sum();
        assert_eq!(further.report.trained, if shared { 2 * each } else { 4 * each });
    }
    assert!(sizes[0] < sizes[1]);
}

#[test]
fn a_residual_that_is_not_there_to_be_shared_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("compact");
    let dense = load("llama");
    let plan = Plan::builder().share(Groups::of(2)).donor(Donor::First);
    let plan = plan.residual(Ranks::Uniform(2), ResidualStart::Svd);
    let folded = fold(&dense, &plan.build(dense.architecture()).unwrap()).unwrap();
    save(&open("llama"), &folded, &directory);
    let path = directory.join("config.json");
    let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    // Depths 1 and 3 have residuals, each beside the matrices of the depth before.
    for (depth, adapter) in [
        (3, json!({ "rank": 2, "residual_of": 1 })),
        (3, json!({ "rank": 2, "residual_of": 2 })),
        (3, json!({ "rank": 2, "residual_of": 3 })),
        (1, json!({ "rank": 2, "residual_of": 3 })),
        (3, json!({ "rank": 2, "residual_of": 99 })),
        (3, json!({ "rank": 2, "residual_of": -1 })),
        (3, json!({ "scale": true, "residual_of": 2 })),
        (3, json!({ "residual_of": 2 })),
        (3, json!({ "rank": 2, "scale_of": 1 })),
    ] {
        let mut changed = config.clone();
        changed["foldgpt"]["blocks"][depth]["adapters"]["q_proj"] = adapter.clone();
        std::fs::write(&path, changed.to_string()).unwrap();
        let error = Checkpoint::open(&directory).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("foldgpt.blocks"), "{depth} {adapter}: {error:?}");
    }
    // Of another rank, and of one that is itself another's.
    let tied = scratch.path().join("tied");
    save(&open("llama"), &tied_in_one(&dense), &tied);
    let path = tied.join("config.json");
    let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(config["foldgpt"]["blocks"][2]["adapters"]["q_proj"], json!({ "rank": 2, "residual_of": 0 }));
    for adapter in [json!({ "rank": 3, "residual_of": 0 }), json!({ "rank": 2, "residual_of": 1 })] {
        let mut changed = config.clone();
        changed["foldgpt"]["blocks"][2]["adapters"]["q_proj"] = adapter.clone();
        std::fs::write(&path, changed.to_string()).unwrap();
        let error = Checkpoint::open(&tied).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("residual for q_proj, expected an earlier block"), "{adapter}: {error:?}");
    }
}

/// All blocks with the matrices of the first, and with one residual of queries.
fn tied_in_one(dense: &Decoder) -> Decoder {
    let plan = Plan::builder().share(Groups::of(4)).build(dense.architecture()).unwrap();
    let (output, input) = dense.architecture().projection_shape(Projection::Q).unwrap();
    let residual = LowRank { a: values(&[2, input], 1), b: values(&[output, 2], 2) };
    (0..4).fold(fold(dense, &plan).unwrap(), |decoder, depth| {
        let adapter = Adapter::new(None, Some(residual.clone()));
        decoder.with_adapter(depth, Projection::Q, adapter).unwrap()
    })
}
