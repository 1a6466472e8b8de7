//! Flags of the examples that heal: what they ask for, and that none is passed over.
#![allow(clippy::unwrap_used, clippy::float_cmp)]

#[path = "../examples/cli/mod.rs"]
mod cli;
mod support;

use clap::Parser;
use foldgpt::heal::{Losses, Trainable};
use foldgpt::model::Projection;
use foldgpt::{Checkpoint, Format, Heal, SaveOptions, perplexity};

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    heal: cli::heal::HealArgs,
}

fn heal(flags: &str) -> Result<Option<Heal>, String> {
    let args = std::iter::once("heal").chain(flags.split_whitespace());
    let args = Args::try_parse_from(args).map_err(|error| error.to_string())?;
    args.heal.heal(0).map_err(|error| error.to_string())
}

#[test]
fn flags_of_a_healing_ask_for_one() {
    assert_eq!(heal("").unwrap(), None);
    for flags in [
        "--train lora",
        "--distill tail",
        "--heal-state S",
        "--heal-log L",
        "--lr 1e-3",
        "--lora-lr 1e-3",
        "--lora-per-depth",
        "--kl-weight 1",
        "--warmup 0.1",
        "--batch 4",
    ] {
        let error = heal(flags).unwrap_err();
        assert!(error.contains("--heal-steps"), "{flags}: {error}");
        assert!(heal(&format!("{flags} --heal-steps 3")).unwrap().is_some());
    }
}

#[test]
fn flags_that_concern_nothing_are_refused() {
    for (flags, expected) in [
        ("--train norms --lora-rank 4", "--train lora"),
        ("--train norms --lora-projections q_proj", "--train lora"),
        ("--train norms --keep-adapters", "--train lora"),
        ("--train lora --lr 1e-3", "--train norms and scales"),
        ("--residual-lr 1e-3", "--train residuals"),
        ("--matrix-lr 1e-3", "--train shared-matrices"),
        ("--last-blocks 2", "need each other"),
        ("--train last-blocks", "need each other"),
        ("--distill none --kl-weight 1", "--distill"),
        ("--distill none --temperature 1", "--distill"),
        ("--distill logits --tail-weight 1", "--distill tail"),
        ("--distill logits --tail-blocks 2", "--distill tail"),
        ("--lora-projections head", "expected one of q_proj"),
    ] {
        let error = heal(&format!("--heal-steps 3 {flags}")).unwrap_err();
        assert!(error.contains(expected), "{flags}: {error}");
    }
}

#[test]
fn flags_reach_the_healing() {
    let asked = heal(
        "--heal-tokens 1000 --ce-weight 0.5 --kl-weight 2 --temperature 3 --tail-weight 4 --tail-blocks 2 --warmup 0.2 \
         --weight-decay 0.1 --lr 1e-2 --lora-lr 2e-3 --residual-lr 3e-3 --matrix-lr 4e-3 --last-blocks 2 \
         --lora-projections q_proj,v_proj --train norms,lora,residuals,last-blocks,head",
    );
    let heal = asked.unwrap().unwrap();
    let losses = heal.losses;
    assert_eq!(
        [losses.cross_entropy, losses.divergence, losses.temperature, losses.tail],
        [0.5, 2.0, 3.0, 4.0]
    );
    assert_eq!(losses.tail_blocks, 2);
    assert_eq!(heal.schedule.warmup, 0.2);
    let decays: Vec<f64> = heal.groups.iter().map(|group| group.weight_decay).collect();
    assert_eq!(decays, [0.0, 0.1, 0.1, 0.1, 0.1], "norms do not decay");
    let rates: Vec<f64> = heal.groups.iter().map(|group| group.learning_rate).collect();
    assert_eq!(rates, [1e-2, 2e-3, 3e-3, 4e-3, 4e-3]);
    let Trainable::Lora(lora) = &heal.groups[1].params else { unreachable!("{heal:?}") };
    assert_eq!(lora.projections, [Projection::Q, Projection::V]);
    assert_eq!(heal.groups[3].params, Trainable::LastBlocks(2));
}

#[test]
fn adapters_are_kept_in_the_compact_format_alone() {
    let args = |flags: &str| Args::try_parse_from(flags.split_whitespace()).unwrap().heal;
    let kept = args("heal --heal-steps 1 --keep-adapters");
    assert!(kept.check_format(Format::Compact).is_ok() && kept.check_format(Format::Expanded).is_err());
    assert!(args("heal --heal-steps 1").check_format(Format::Expanded).is_ok());
    let heal = kept.heal(0).unwrap().unwrap();
    assert!(heal.groups.iter().any(|group| matches!(&group.params, Trainable::Lora(lora) if !lora.merge)));
}

#[test]
fn a_teacher_is_given_where_it_teaches_and_nowhere_else() {
    let check = |losses: &Losses, given| cli::heal::HealArgs::check_teacher(losses, given);
    assert!(check(&Losses::default(), false).is_ok() && check(&Losses::tail(), true).is_ok());
    assert!(check(&Losses::logits(), false).unwrap_err().to_string().contains("--teacher is needed"));
    assert!(check(&Losses::default(), true).unwrap_err().to_string().contains("--teacher is for"));
}

#[derive(Parser)]
struct FormatFlags {
    #[command(flatten)]
    format: cli::target::FormatArgs,
}

#[test]
fn a_model_is_written_as_it_was_unless_another_format_is_asked_for() {
    let of = |flags: &str, source: &Checkpoint, adapted: bool| {
        let flags = FormatFlags::try_parse_from(flags.split_whitespace()).unwrap();
        flags.format.of(source, adapted)
    };
    let standard = support::open("llama");
    let (_, pairs) = support::kinds("llama").swap_remove(0);
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("compact");
    let compact = SaveOptions::from(Format::Compact);
    standard.save(&support::folded("llama", &pairs), None, &directory, &compact, &mut ()).unwrap();
    let shared = Checkpoint::open(&directory).unwrap();
    assert_eq!(
        (of("drop", &standard, false), of("drop", &shared, false)),
        (Format::Expanded, Format::Compact)
    );
    assert_eq!(of("heal", &standard, true), Format::Compact);
    assert_eq!(of("drop --format expanded", &shared, false), Format::Expanded);
    assert_eq!(of("drop --format compact", &standard, false), Format::Compact);
}

#[test]
fn without_flags_a_healing_is_that_of_the_library() {
    let (asked, usual) = (heal("--heal-steps 200 --distill none").unwrap().unwrap(), Heal::default());
    assert_eq!(asked, usual);
    let rates: Vec<f64> = usual.groups.iter().map(|group| group.learning_rate).collect();
    assert_eq!(rates, [5e-3, 5e-3, 1e-3]);
}

#[test]
fn the_card_of_a_healed_model_says_how_and_what_it_was_worth() {
    let checkpoint = support::open("llama");
    let (dense, windows) = (support::load("llama"), support::windows("llama"));
    let cut = dense.with_blocks(&[0, 1, 3]).unwrap();
    let mut heal = Heal::default();
    (heal.budget, heal.batch) = (foldgpt::heal::Budget::Steps(2), 1);
    let healed = heal.run(&cut, &windows, None, None, &mut ()).unwrap();
    let found = [&cut, &healed.decoder].map(|decoder| perplexity(decoder, &windows, &mut ()).unwrap());
    let plain = checkpoint.card(&healed.decoder, None);
    let card = |taught| cli::heal::card(plain.clone(), &healed.report, taught, [&found[0], &found[1]]);
    let body = card(true).body;
    assert!(body.contains("blocks that were removed: 2\n") && !body.contains("not measured"), "{body}");
    assert!(body.contains("healed for 2 steps") && body.contains("held to the original model"), "{body}");
    for (name, found) in [("before", &found[0]), ("healed", &found[1])] {
        assert!(body.contains(&format!("| {name} | {:.4} |", found.mean_nll)), "{body}");
    }
    assert!(body.contains(windows.text_sha256()), "{body}");
    assert!(card(true).tags.contains(&"knowledge-distillation".to_string()));
    assert!(!card(false).tags.contains(&"knowledge-distillation".to_string()));
    assert!(card(false).body.contains("by the text alone"));
}
