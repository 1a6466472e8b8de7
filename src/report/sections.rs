//! A report's sections.

use super::document::{Cell, Document, Part, Section, Table, Text, Topic};
use super::number::{fixed, list, signed, significant};
use super::roles::{groups, letter, matrices, removed, role_of, words as role_words};
use super::words;
use super::{Row, Value};
use crate::error::{Error, Result};
use crate::eval::Perplexity;
use crate::pipeline::Report;

/// Pairs of blocks that are named beside the coupling's figure.
const PAIRS: usize = 8;

impl Report {
    /// All of it, as Markdown and HTML are written from it.
    pub(super) fn document(&self) -> Result<Document> {
        let mut sections = vec![
            Section { title: "Asked", parts: self.asked() },
            Section { title: "Before and after", parts: self.before_and_after() },
            Section { title: "Protocol", parts: self.protocol() },
            Section { title: "Blocks", parts: self.blocks() },
            Section { title: "Size and loss", parts: self.size_and_loss() },
            Section { title: "Healing", parts: self.healing() },
            Section { title: "Samples", parts: self.continuations() },
            Section { title: "Provenance", parts: self.provenance()? },
        ];
        sections.retain(|section| !section.parts.is_empty());
        Ok(Document {
            title: format!("{}, compressed", self.model_name()),
            summary: self.summary(),
            sections,
        })
    }

    /// The model that was compressed: the last part of its path or id.
    pub(super) fn model_name(&self) -> &str {
        let model = self.recipe.model.trim_end_matches(['/', '\\']);
        model.rsplit(['/', '\\']).next().unwrap_or(model)
    }

    /// The result in a sentence.
    pub(super) fn summary(&self) -> String {
        let (dense, after) = (&self.dense, &self.compressed);
        let share = 100.0 * (after.parameters as f64 / dense.parameters.max(1) as f64 - 1.0);
        format!(
            "{} of {} blocks run, with {} of {} parameters ({} %); the loss is {} nats per token, {} from {}.",
            after.blocks,
            dense.blocks,
            fixed(after.parameters as f64, 0),
            fixed(dense.parameters as f64, 0),
            signed(share, 1),
            fixed(after.perplexity.mean_nll, 4),
            signed(self.nll_increase(), 4),
            fixed(dense.perplexity.mean_nll, 4),
        )
    }

    fn asked(&self) -> Vec<Part> {
        let recipe = &self.recipe;
        let mut facts: Vec<(&str, Text)> = vec![
            ("model", Text::code(&recipe.model)),
            ("text", Text::code(recipe.text.display().to_string())),
            ("removal", words::target(recipe).into()),
        ];
        if self.plan.scores().is_some() {
            facts.push(("scored by", format!("{}, in {}", recipe.method, precision(recipe.dtype)).into()));
        }
        if !recipe.protect.is_empty() {
            facts.push(("blocks that have to stay", list(&recipe.protect).into()));
        }
        facts.extend(recipe.share.iter().map(|share| ("sharing", words::share(share).into())));
        facts.extend(recipe.mix.iter().map(|mix| ("total", words::mix(mix).into())));
        facts.extend(recipe.heal.iter().map(|heal| ("healing", words::heal(heal).into())));
        let gate = |limit: f64| format!("at most {limit} nats per token above the dense model").into();
        facts.extend(recipe.gate().map(|limit| ("quality gate", gate(limit))));
        facts.push(("written to", Text::code(recipe.out.display().to_string())));
        facts.push(("in the format", self.format.to_string().into()));
        vec![Part::Facts(facts)]
    }

    pub(super) fn before_and_after(&self) -> Vec<Part> {
        let rows = self.comparison();
        let folded = rows.iter().any(|row| row.folded.is_some());
        let mut heads = vec!["", "dense", "cut", self.result_name(), "difference", "relative"];
        heads.retain(|head| folded || *head != "cut");
        let mut table = Table::new("Before and after", [""; 0]);
        table.heads = heads.into_iter().map(str::to_string).collect();
        table.rows = rows.iter().map(|row| compared(row, folded)).collect();
        let mut parts = vec![Part::Table(table)];
        if !self.dense.tasks.is_empty() {
            parts.push(Part::Text("± is one standard error.".into()));
        }
        if self.dense.account.is_some() {
            parts.push(Part::Text(format!(
                "FLOPs are those of a token that sees {} tokens, itself among them; resident bytes are those of weights in \
                 f32. Both are counted, and so are keys and values.",
                self.dense.perplexity.seq_len
            )));
        }
        if let Some(latency) = &self.dense.latency {
            let (prompt, new, runs) = (latency.prompt, latency.new_tokens, latency.prefill.runs);
            parts.push(Part::Text(format!(
                "Prefill reads {prompt} tokens, decode makes {new} after them, in {} on {}: medians of {runs} \
                 runs of the models in turns, with the slowest and the fastest.",
                latency.dtype,
                if latency.threads == 1 { "1 thread".into() } else { format!("{} threads", latency.threads) }
            )));
        }
        parts
    }

    pub(super) fn protocol(&self) -> Vec<Part> {
        let found = &self.compressed.perplexity;
        let text = "NLL is the mean negative log-likelihood in nats per predicted token, computed in f32; perplexity is \
                    its exponential. The evaluation windows are the first of the last 20 % of the text, each scored alone.";
        let calibration = &self.calibration;
        let calibrated = format!(
            "{} windows of {} tokens, {}, spread over the first 80 % of the text",
            calibration.windows,
            calibration.seq_len,
            read(calibration.bos, calibration.split_special_tokens)
        );
        let mut facts = vec![
            ("evaluated on", windows_of(found).into()),
            ("evaluation text, sha256", Text::code(&found.text_sha256)),
            ("calibrated on", calibrated.into()),
            ("calibration text, sha256", Text::code(&calibration.text_sha256)),
        ];
        if calibration.many_unknown {
            let what =
                "one calibration token in a hundred or more is the unknown one, and may decide the loss";
            facts.push(("take care", what.into()));
        }
        if !self.dense.tasks.is_empty() {
            let items =
                |(name, task): (&String, &crate::eval::Accuracy)| format!("{name} ({} items)", task.items);
            let tasks: Vec<String> = self.dense.tasks.iter().map(items).collect();
            facts.push(("tasks, by lm-evaluation-harness's rules", tasks.join(", ").into()));
        }
        let mut parts = vec![Part::Text(text.into()), Part::Facts(facts)];
        if self.heal.is_some() {
            parts.push(Part::Text(
                "The healed model was trained on the first 80 % of this text, the original was not. That its loss is \
                 lower, where it is, tells of the text and not of a better model: the original gains by such a fine-tune \
                 too."
                    .into(),
            ));
        }
        parts
    }

    fn blocks(&self) -> Vec<Part> {
        let plan = &self.plan;
        let mut parts = vec![Part::Figures(Topic::Blocks)];
        if let Some(scores) = plan.scores() {
            let mut facts: Vec<(&str, Text)> = vec![
                ("method", Text::code(&scores.method)),
                ("importance is", words::importance(&scores.method).into()),
            ];
            facts.extend(removed(plan).into_iter().map(|(name, fact)| (name, fact.into())));
            let stability = |stability: f64| {
                let low = if scores.is_stable() == Some(false) { ": low, use more windows" } else { "" };
                format!("{stability:.3}, Spearman's rank correlation of two halves{low}")
            };
            facts.extend(scores.stability.map(|found| ("stability", stability(found).into())));
            facts.push((
                "cost",
                format!("{:.1} s, {} block runs", scores.seconds, fixed(scores.block_runs, 0)).into(),
            ));
            parts.push(Part::Facts(facts));
        }
        parts.push(Part::Table(self.block_table()));
        parts.extend(self.pair_table().map(Part::Table));
        parts.extend(self.group_table().map(Part::Table));
        parts
    }

    fn block_table(&self) -> Table {
        let plan = &self.plan;
        let mut table =
            Table::new("Block by block", ["block", "importance", "what became of it", "matrices"]);
        table.aside = true;
        let Some(scores) = plan.scores() else {
            table.heads.remove(1);
            table.rows = (0..plan.depth())
                .map(|block| {
                    let role = role_of(plan, block, crate::model::Part::Whole);
                    vec![
                        Cell::number(block as f64, block.to_string()),
                        Cell::word(role_words(&role)),
                        Cell::word(matrices(plan, block)),
                    ]
                })
                .collect();
            return table;
        };
        table.rows = scores
            .blocks
            .iter()
            .map(|score| {
                let role = role_of(plan, score.index, score.part);
                vec![
                    Cell::word(score.unit().to_string()),
                    Cell::number(score.importance, significant(score.importance)),
                    Cell::word(role_words(&role)),
                    Cell::word(matrices(plan, score.index)),
                ]
            })
            .collect();
        table
    }

    /// The pairs of blocks whose coupling is the strongest.
    fn pair_table(&self) -> Option<Table> {
        let coupling = self.plan.scores()?.coupling.as_ref()?;
        let mut pairs: Vec<(usize, usize, f64)> = Vec::new();
        for (i, row) in coupling.iter().enumerate() {
            pairs.extend(row.iter().enumerate().skip(i + 1).map(|(j, value)| (i, j, *value)));
        }
        pairs.sort_by(|a, b| b.2.abs().total_cmp(&a.2.abs()));
        let mut table = Table::new("The strongest couplings", ["blocks", "nats per token", "what it says"]);
        table.aside = true;
        for (i, j, value) in pairs.into_iter().take(PAIRS) {
            let says = if value > 0.0 { "they cover for each other" } else { "one is of little use alone" };
            let value = Cell::number(value, signed(value, 4));
            table.rows.push(vec![Cell::word(format!("{i} and {j}")), value, Cell::word(says)]);
        }
        Some(table).filter(|table| !table.rows.is_empty())
    }

    fn group_table(&self) -> Option<Table> {
        let groups = groups(&self.plan);
        let mut table = Table::new("Groups that share", ["group", "blocks", "cost, nats per token"]);
        table.aside = true;
        table.rows = groups
            .iter()
            .enumerate()
            .map(|(place, group)| {
                let cost = group.cost.map_or_else(Cell::empty, |cost| Cell::number(cost, signed(cost, 4)));
                vec![Cell::word(letter(place)), Cell::word(list(&group.blocks)), cost]
            })
            .collect();
        Some(table).filter(|table| !table.rows.is_empty())
    }

    fn size_and_loss(&self) -> Vec<Part> {
        let mut parts = vec![Part::Figures(Topic::Size)];
        let mut others = Table::new(
            "Others of this working directory",
            ["directory", "blocks", "parameters", "NLL", "healed"],
        );
        others.rows = self
            .others
            .iter()
            .map(|other| {
                vec![
                    Cell::word(Text::code(other.out.display().to_string())),
                    Cell::number(other.blocks as f64, other.blocks.to_string()),
                    Cell::number(other.parameters as f64, fixed(other.parameters as f64, 0)),
                    Cell::number(other.mean_nll, fixed(other.mean_nll, 4)),
                    Cell::word(if other.healed { "yes" } else { "no" }),
                ]
            })
            .collect();
        let mut mixes = Table::new(
            "Mixes that were tried, by loss on the calibration windows",
            ["parameters", "NLL", "blocks removed", "for residuals, %", "beaten"],
        );
        mixes.rows = self
            .mixes
            .iter()
            .map(|mix| {
                vec![
                    Cell::number(mix.parameters as f64, fixed(mix.parameters as f64, 0)),
                    Cell::number(mix.loss, fixed(mix.loss, 4)),
                    Cell::number(mix.removed as f64, mix.removed.to_string()),
                    Cell::number(100.0 * mix.residual_share, fixed(100.0 * mix.residual_share, 1)),
                    Cell::word(if mix.beaten { "yes" } else { "no" }),
                ]
            })
            .collect();
        parts.extend([others, mixes].into_iter().filter(|table| !table.rows.is_empty()).map(Part::Table));
        parts
    }

    fn healing(&self) -> Vec<Part> {
        let Some(heal) = &self.heal else { return Vec::new() };
        let ended = if heal.stopped_early { "early, for want of progress" } else { "with its budget" };
        let facts: Vec<(&str, Text)> = vec![
            ("steps", fixed(heal.steps as f64, 0).into()),
            ("predicted tokens", fixed(heal.tokens as f64, 0).into()),
            ("numbers trained", fixed(heal.trained as f64, 0).into()),
            ("weights kept", format!("those after step {}", heal.kept).into()),
            ("ended", ended.into()),
            ("time", format!("{:.1} s", heal.seconds).into()),
        ];
        let mut table = Table::new("Loss on windows held out of the training", ["after step", "NLL"]);
        table.aside = true;
        table.rows = heal
            .held_out
            .iter()
            .map(|&(step, loss)| {
                vec![Cell::number(step as f64, step.to_string()), Cell::number(loss, fixed(loss, 4))]
            })
            .collect();
        let mut parts = vec![Part::Figures(Topic::Healing), Part::Facts(facts)];
        if !table.rows.is_empty() {
            parts.push(Part::Table(table));
        }
        parts
    }

    fn continuations(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        if !self.samples.is_empty() {
            parts.push(Part::Text("Always the likeliest next token. They show, and measure nothing.".into()));
        }
        for sample in &self.samples {
            parts.push(Part::Quote("beginning".into(), sample.prompt.clone()));
            parts.push(Part::Quote("dense".into(), sample.dense.clone()));
            parts.extend(sample.folded.iter().map(|text| Part::Quote("cut".into(), text.clone())));
            parts.push(Part::Quote(self.result_name().into(), sample.compressed.clone()));
        }
        parts
    }

    fn provenance(&self) -> Result<Vec<Part>> {
        let mut facts: Vec<(&str, Text)> = vec![
            ("foldgpt", self.version.clone().into()),
            ("plan format", format!("version {}", crate::plan::PLAN_VERSION).into()),
            ("seed", self.recipe.seed.to_string().into()),
            ("dense weights, sha256", Text::code(&self.model_sha256)),
            ("saved weights, sha256", Text::code(&self.saved_sha256)),
            ("calibration text, sha256", Text::code(&self.calibration.text_sha256)),
            ("evaluation text, sha256", Text::code(&self.dense.perplexity.text_sha256)),
        ];
        let task = |(name, sha256): (&String, &String)| Text::code(format!("{sha256}  {name}"));
        facts.extend(self.task_files.iter().map(|file| ("task file, sha256", task(file))));
        facts.extend(self.command.iter().map(|command| ("command", Text::code(command))));
        let unwritable = |error: serde_json::Error| Error::Report(error.to_string());
        let mut recipe = serde_json::to_value(&self.recipe).map_err(unwritable)?;
        if let Some(fields) = recipe.as_object_mut() {
            // What is absent is as it is by default, and says nothing.
            fields.retain(|_, value| !value.is_null());
        }
        let recipe = serde_json::to_string_pretty(&recipe).map_err(unwritable)?;
        Ok(vec![Part::Facts(facts), Part::Code("The recipe, to run it again", "json", recipe)])
    }
}

fn compared(row: &Row, folded: bool) -> Vec<Cell> {
    let unit = if row.unit.is_empty() { String::new() } else { format!(" ({})", row.unit) };
    let value = |value: Option<Value>| {
        let shown = |value: Value| {
            let error = value.error.map(|error| format!(" ± {}", fixed(error, row.digits)));
            let shown = |number: f64| fixed(number, row.digits);
            let range = value.range.map(|[least, most]| format!(" ({} to {})", shown(least), shown(most)));
            let more = error.or(range).unwrap_or_default();
            Cell::number(value.value, shown(value.value) + &more)
        };
        value.map_or_else(Cell::empty, shown)
    };
    let difference = |value: f64| Cell::number(value, signed(value, row.digits));
    let relative = |share: f64| Cell::number(share, format!("{} %", signed(100.0 * share, 1)));
    let mut cells = vec![Cell::word(format!("{}{unit}", row.quantity)), value(row.dense)];
    if folded {
        cells.push(value(row.folded));
    }
    cells.push(value(row.compressed));
    cells.push(row.difference.map_or_else(Cell::empty, difference));
    cells.push(row.relative.map_or_else(Cell::empty, relative));
    cells
}

fn windows_of(found: &Perplexity) -> String {
    format!(
        "{} predicted tokens in {} windows of {}, {}",
        fixed(found.tokens as f64, 0),
        found.windows,
        found.seq_len,
        read(found.bos, found.split_special_tokens)
    )
}

/// How a text was read.
fn read(bos: bool, split_special_tokens: bool) -> String {
    let bos = if bos { "with" } else { "without" };
    let split = if split_special_tokens { ", special tokens split" } else { "" };
    format!("{bos} begin-of-text token{split}")
}

fn precision(dtype: crate::pipeline::Precision) -> &'static str {
    match dtype {
        crate::pipeline::Precision::F32 => "f32",
        crate::pipeline::Precision::Bf16 => "bf16",
    }
}
