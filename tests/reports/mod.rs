//! Reports that no run has made: with every part there is, and with as few as there can be.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use foldgpt::pipeline::Report;
use serde_json::{Value, json};

/// A text that would be markup, a terminal's command and the end of whatever it stands in, if it were let.
pub const HOSTILE: &str = "--- harmless <img src=x onerror=alert(1)> </script></style></svg> \"'&amp; `code` ```` |*b*|_i_ [l](u)\n# h\n---\n\u{1b}[31m\u{202e}red";

fn perplexity(nll: f64) -> Value {
    json!({
        "mean_nll": nll, "perplexity": nll.exp(), "tokens": 16352, "windows": 32, "seq_len": 512, "bos": false,
        "text_sha256": "e".repeat(64)
    })
}

fn measured(blocks: usize, parameters: usize, nll: f64) -> Value {
    json!({
        "blocks": blocks, "parameters": parameters, "perplexity": perplexity(nll),
        "account": { "parameters": parameters, "stored_bytes": 2 * parameters, "resident_bytes": 4 * parameters,
            "flops_per_token": 2 * parameters + 4 * 512 * 576 * blocks, "kv_bytes_per_token": 1536 * blocks },
        "tasks": { "piqa": { "acc": 0.6834, "acc_norm": 0.68, "stderr": 0.0108, "acc_norm_stderr": 0.011, "items": 1838 },
            "lambada": { "acc": 0.4 * nll / 3.0, "stderr": 0.007, "perplexity": 2.0 * nll.exp(), "items": 500 } }
    })
}

const BLOCKS: usize = 30;

fn plan(full: bool) -> Value {
    let importance = |block: usize| 0.5 + 0.5 * (block as f64 * 1.7).sin();
    let blocks: Vec<Value> =
        (0..BLOCKS).map(|index| json!({ "index": index, "importance": importance(index) })).collect();
    let mut scores = json!({
        "method": if full { "coupling" } else { "block-influence" },
        "windows": 16, "seq_len": 512, "bos": false, "text_sha256": "c".repeat(64), "blocks": blocks,
        "seconds": 123.4, "block_runs": 45678.0
    });
    if full {
        let pair =
            |i: usize, j: usize| 0.02 * ((i * 7 + j * 7 + i * j) as f64).sin() / (1.0 + i.abs_diff(j) as f64);
        let row = |i: usize| (0..BLOCKS).map(|j| pair(i, j)).collect::<Vec<_>>();
        scores["coupling"] = (0..BLOCKS).map(row).collect::<Vec<_>>().into();
        let gate =
            |step: usize, block: usize| 0.5 + (importance(block) - 0.5) * (step as f64 / 120.0).min(1.0);
        let gates = |step: usize| (0..BLOCKS).map(|block| gate(step, block)).collect::<Vec<_>>();
        scores["trajectory"] = (0..120).map(gates).collect::<Vec<_>>().into();
        scores["chosen"] = json!([20, 12, 9, 16]);
        scores["stability"] = 0.91.into();
    }
    let mut plan = json!({
        "version": 2, "model_type": "llama", "depth": BLOCKS, "model_sha256": "a".repeat(64),
        "target": if full { json!({ "blocks": 4 }) } else { json!({ "blocks": 1 }) },
        "protected": [], "removed": if full { vec![9, 12, 16, 20] } else { vec![9] }, "scores": scores
    });
    if full {
        plan["sharing"] = json!({
            "asked": { "explicit": [[3, 4], [21, 22, 23]] }, "donor": "mean", "own": { "norms": true },
            "groups": [{ "blocks": [3, 4], "donor": "mean", "cost": 0.034 }, { "blocks": [21, 22, 23], "donor": { "block": 22 } }]
        });
    }
    plan
}

/// A report with everything, and hostile texts wherever one comes from outside.
pub fn full() -> Report {
    let mixes = [(80_000_000, 4.2, false), (90_000_000, 4.4, true), (110_000_000, 3.5, false)];
    let mixes: Vec<Value> = mixes
        .iter()
        .map(|(parameters, loss, beaten)| json!({ "parameters": parameters, "loss": loss, "removed": 3, "residual_share": 0.05, "beaten": beaten }))
        .collect();
    let curve: Vec<Value> = (1..=120)
        .map(|step| {
            let fall = 1.0 / f64::from(step);
            json!({ "step": step, "steps": 1, "loss": 4.0 + fall, "cross_entropy": 3.2 + fall, "divergence": 0.5 * fall, "tail": 0.3 })
        })
        .collect();
    let recipe = json!({
        "model": format!("/models/{HOSTILE}"), "text": format!("/texts/{HOSTILE}.txt"), "out": HOSTILE, "seed": 7,
        "target": { "blocks": 4 }, "protect": [0, 29], "max_nll_increase": 0.5,
        "share": { "groups": { "explicit": [[3, 4], [21, 22, 23]] } },
        "heal": { "budget": { "steps": 120 }, "losses": { "divergence": 1.0, "tail": 1.0 } },
        "samples": { "prompts": [HOSTILE] }
    });
    let report = json!({
        "version": "0.1.0", "command": format!("compress --model {HOSTILE}"), "recipe": recipe,
        "model_sha256": "a".repeat(64), "saved_sha256": "b".repeat(64),
        "calibration": { "windows": 16, "seq_len": 512, "bos": false, "text_sha256": "c".repeat(64) },
        "dense": measured(30, 134_515_008, 3.265_612_3), "folded": measured(26, 110_274_432, 4.049_6),
        "compressed": measured(26, 110_274_433, 3.401_234_5),
        "dense_bytes": 269_030_016, "saved_bytes": 226_548_864,
        "plan": plan(true), "mixes": mixes, "calibration_nll": 3.1,
        "heal": { "steps": 120, "tokens": 245_280, "trained": 1_234_567, "held_out": [[0, 4.1], [50, 3.5], [100, 3.45], [120, 3.46]],
            "kept": 100, "stopped_early": false, "seconds": 61.5 },
        "heal_curve": curve,
        "samples": [{ "prompt": HOSTILE, "dense": HOSTILE, "folded": "the the the", "compressed": HOSTILE }],
        "others": [{ "out": HOSTILE, "blocks": 20, "parameters": 100_000_000, "mean_nll": 3.9, "healed": true }]
    });
    Report::from_json(&report.to_string()).unwrap()
}

/// A report of one block removed, by scores alone.
pub fn plain() -> Report {
    let mut dense = measured(30, 134_515_008, 3.265_6);
    let mut compressed = measured(29, 130_974_912, 3.401_2);
    dense["tasks"] = json!({});
    compressed["tasks"] = json!({});
    let report = json!({
        "version": "0.1.0",
        "recipe": { "model": "org/name", "text": "text.txt", "out": "smaller", "method": "block-influence", "target": { "blocks": 1 } },
        "model_sha256": "a".repeat(64), "saved_sha256": "b".repeat(64),
        "calibration": { "windows": 16, "seq_len": 512, "bos": false, "text_sha256": "c".repeat(64) },
        "dense": dense, "folded": null, "compressed": compressed,
        "dense_bytes": 269_030_016, "saved_bytes": 262_000_000, "plan": plan(false), "mixes": [], "heal": null
    });
    Report::from_json(&report.to_string()).unwrap()
}
