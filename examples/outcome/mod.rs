//! What a compression found, for a terminal.
#![allow(unreachable_pub, clippy::print_stdout)]

use foldgpt::pipeline::{Goal, Report};

use crate::{chart, cli, table};

pub fn print(report: &Report) {
    let front: Vec<_> = report.mixes.iter().filter(|mix| !mix.beaten).collect();
    if !front.is_empty() {
        println!("mixes that no other beats, by loss on the calibration windows:");
    }
    for mix in front {
        let (removed, percent) = (mix.removed, 100.0 * mix.residual_share);
        println!(
            "{:>12} parameters  {:.4}  {removed} blocks removed, {percent:.1} % for residuals",
            mix.parameters, mix.loss
        );
    }
    cli::warn_of_unknown(report.calibration.many_unknown, report.calibration.split_special_tokens);
    let plan = &report.plan;
    if let Some(scores) = plan.scores() {
        println!("importance by {} on {} windows of {}", scores.method, scores.windows, scores.seq_len);
        print!("{}", chart::bars(scores, &plan.units(), "removed"));
        // For a limit of the loss, blocks go in the set's order as long as it is kept.
        let limited = matches!(report.recipe.target, Some(Goal::NllIncrease(_)));
        if scores.coupling.is_some() && !limited && cli::scoring::chose(scores, plan.removed()) {
            println!("chosen as a set, by true losses, and not by the ranking");
        }
        cli::scoring::warn_unstable(scores);
    }
    if let Some(sharing) = plan.sharing().filter(|sharing| !sharing.groups.is_empty()) {
        for group in &sharing.groups {
            let cost = group.cost.map(|cost| format!(", {cost:+.4} nats")).unwrap_or_default();
            println!("blocks {:?} share matrices, {}{cost}", group.blocks, group.donor);
        }
        println!("blocks that share have {}", sharing.own);
    }
    let name = if report.heal.is_some() { "healed" } else { "compressed" };
    println!("\n{}", table::compared(&report.comparison(), name));
    println!("NLL on {}", cli::protocol_of(&report.compressed.perplexity));
    if let Some(latency) = &report.dense.latency {
        println!("{}", table::speed_protocol(latency));
    }
    if let Some(healed) = &report.heal {
        println!("{}", cli::heal::summary(healed));
    }
    if let Some(limit) = report.recipe.max_memory {
        let place = if report.streamed {
            "blocks were read from disk one at a time"
        } else {
            "the model was in memory"
        };
        println!("{place}, for at most {limit}");
    }
    let ran: Vec<&str> = report.ran.iter().map(|stage| stage.name()).collect();
    println!("done now: {}", if ran.is_empty() { "nothing".into() } else { ran.join(", ") });
    println!(
        "saved to {} in the {} format ({} bytes of tensors)",
        report.recipe.out.display(),
        report.format,
        report.saved_bytes
    );
}
