//! The stages, one after the other, each only where its result is not known.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Compressor;
use super::curve::{Healing, curve};
use super::inputs::{Inputs, Keys};
use super::planning::Planned;
use super::recipe::Precision;
use super::report::{Measured, Report, SavedRecord};
use super::stage::Stage;
use super::work::Key;
use crate::account::{Account, Held};
use crate::checkpoint::{Checkpoint, Format, SaveOptions, check_destination, compact_bytes};
use crate::error::{Error, Result};
use crate::eval::{Accuracy, Latency, Task, accuracy, latency, perplexity, perplexity_streamed};
use crate::fold::fold_on;
use crate::heal::{Teacher, read_log};
use crate::importance::Scores;
use crate::model::{Architecture, Decoder, StoredTypes};
use crate::plan::{Calibration, Plan};
use crate::progress::{self, Observer};

/// A compression that runs. Models are read and made when a stage needs them.
pub(super) struct Run<'a> {
    pub(super) inputs: Inputs<'a>,
    pub(super) keys: Keys,
    command: Option<String>,
    /// What an earlier run of this recipe has written.
    pub(super) saved: Option<SavedRecord>,
    dense: Option<Decoder>,
    folded: Option<Decoder>,
    result: Option<Decoder>,
    ran: BTreeSet<Stage>,
}

impl<'a> Run<'a> {
    /// Opens and checks everything; the destination is new, or what this very recipe has written.
    pub(super) fn open(compressor: &'a Compressor, observer: &mut dyn Observer) -> Result<Self> {
        let Compressor { recipe, command } = compressor;
        let inputs = Inputs::open(recipe, observer)?;
        let keys = inputs.keys()?;
        let saved = inputs.saved(&keys, observer)?;
        if saved.is_none() {
            check_destination(&recipe.out)?;
        }
        let (command, ran) = (command.clone(), BTreeSet::new());
        Ok(Self { inputs, command, saved, keys, dense: None, folded: None, result: None, ran })
    }

    pub(super) fn finish(mut self, observer: &mut dyn Observer) -> Result<Report> {
        let scores = self.score(observer)?;
        let key = self.keys.plan.clone();
        let planned = self.stage(Stage::Plan, PLAN, &key, observer, |run, observer| {
            let dense = if run.streams() { None } else { Some(run.dense(observer)?) };
            run.inputs.decide(dense.as_ref(), scores.as_ref(), observer)
        })?;
        let Planned { plan, mixes, dense_loss } = planned;
        let healing = self.heal(&plan, observer)?;

        let Keys { dense, folded, evaluate, .. } = self.keys.clone();
        let (all, kept): (Vec<usize>, _) = ((0..self.inputs.depth()).collect(), plan.kept());
        let mut dense = self.measured(&dense, &all, observer, |run, observer| run.dense(observer))?;
        let folded = healing
            .is_some()
            .then(|| self.measured(&folded, &kept, observer, |run, observer| run.folded(&plan, observer)));
        let folded = folded.transpose()?;
        let mut compressed =
            self.measured(&evaluate, &kept, observer, |run, observer| run.result(&plan, observer))?;
        self.check_gate(&dense, &compressed)?;
        (dense.latency, compressed.latency) = self.latency(&plan, observer)?.unzip();
        let samples = self.samples(&plan, observer)?;

        let saved_bytes = match &self.saved {
            Some(saved) => saved.tensor_bytes,
            None => self.bytes_to_save(&plan, observer)?,
        };
        let (heal, heal_curve) = healing.map(|healing| (healing.report, healing.curve)).unzip();
        let inputs = &self.inputs;
        let mut report = Report {
            version: env!("CARGO_PKG_VERSION").into(),
            command: self.command.clone(),
            recipe: inputs.recipe.clone(),
            model_sha256: inputs.model_sha256.clone(),
            saved_sha256: String::new(),
            task_files: inputs.task_files.clone(),
            calibration: Calibration::from(&inputs.calibration),
            dense,
            folded,
            compressed,
            dense_bytes: inputs.checkpoint.tensor_bytes(),
            saved_bytes,
            format: inputs.format(&plan),
            plan,
            mixes,
            calibration_nll: dense_loss,
            heal,
            heal_curve: heal_curve.unwrap_or_default(),
            streamed: inputs.streamed.is_some(),
            samples,
            others: Vec::new(),
            ran: Vec::new(),
        };
        report.saved_sha256 = self.save(&report, observer)?;
        report.others = self.others(&report)?;
        self.inputs.work.keep(REPORT, &self.keys.report(&self.inputs)?, &report)?;
        report.ran = self.ran.into_iter().collect();
        Ok(report)
    }

    /// The result of a stage: the one that is known, or what `make` makes now.
    pub(super) fn stage<T: Serialize + DeserializeOwned>(
        &mut self,
        stage: Stage,
        name: &str,
        key: &Key,
        observer: &mut dyn Observer,
        make: impl FnOnce(&mut Self, &mut dyn Observer) -> Result<T>,
    ) -> Result<T> {
        self.stage_with(stage, name, key, observer, |_, _| Ok(()), |run, (), observer| make(run, observer))
    }

    /// As `stage`, of `models` that are read or made before it begins: folding is a stage of its own, and no part of
    /// another.
    pub(super) fn stage_with<M, T: Serialize + DeserializeOwned>(
        &mut self,
        stage: Stage,
        name: &str,
        key: &Key,
        observer: &mut dyn Observer,
        models: impl FnOnce(&mut Self, &mut dyn Observer) -> Result<M>,
        make: impl FnOnce(&mut Self, M, &mut dyn Observer) -> Result<T>,
    ) -> Result<T> {
        if let Some(known) = self.inputs.work.known(name, key)? {
            return Ok(known);
        }
        let models = models(self, observer)?;
        self.begin(stage, observer, |run, observer| {
            let made = make(run, models, observer)?;
            run.inputs.work.keep(name, key, &made)?;
            Ok(made)
        })
    }

    /// Runs a stage, and notes that it ran.
    pub(super) fn begin<T>(
        &mut self,
        stage: Stage,
        observer: &mut dyn Observer,
        make: impl FnOnce(&mut Self, &mut dyn Observer) -> Result<T>,
    ) -> Result<T> {
        self.ran.insert(stage);
        progress::stage(stage.observed(), 1, observer, |observer| {
            let made = make(self, observer)?;
            progress::advance(stage.observed(), 1, 1, observer)?;
            Ok(made)
        })
    }

    fn score(&mut self, observer: &mut dyn Observer) -> Result<Option<Scores>> {
        let Some(key) = self.keys.score.clone() else { return Ok(None) };
        let scores = self.stage(Stage::Score, SCORES, &key, observer, |run, observer| {
            let dense = if run.streams() { None } else { Some(run.dense(observer)?) };
            let inputs = &run.inputs;
            let method = inputs.recipe.method;
            let mut options = inputs.method_options();
            options.gates_file = Some(inputs.work.new_path("gates", &key, ".json")?);
            // What was measured of sets of blocks serves other numbers and windows too.
            let values = Key::of(method.name(), &(inputs.model(), inputs.recipe.dtype))?;
            options.values_file = Some(inputs.work.new_path(method.name(), &values, ".jsonl")?);
            let (method, dtype) = (method.build(&options), inputs.recipe.dtype);
            let Some(dense) = dense else {
                return method.score_streamed(&inputs.stream(dtype.dtype())?, &inputs.calibration, observer);
            };
            let scored = if dtype == Precision::F32 { dense } else { dense.to_dtype(dtype.dtype())? };
            method.score(&scored, &inputs.calibration, observer)
        })?;
        Ok(Some(scores))
    }

    /// Heals, and keeps the weights as a checkpoint beside the report; its state is kept until then.
    fn heal(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<Option<Healing>> {
        let (Some(key), Some(mut heal)) = (self.keys.heal.clone(), self.inputs.heal()) else {
            return Ok(None);
        };
        let weights = self.inputs.work.path(HEALED, &key, "");
        if let Some(healing) = self.inputs.work.known(HEALED, &key)?.filter(|_| weights.exists()) {
            return Ok(Some(healing));
        }
        let folded = self.folded(plan, observer)?;
        let dense = self.dense(observer)?;
        let state = self.inputs.work.new_path("healing", &key, ".safetensors")?;
        // Those that the caller has named are the caller's.
        heal.state_file.get_or_insert_with(|| state.clone());
        let log = self.inputs.work.path("healing", &key, ".jsonl");
        let log = heal.log_file.get_or_insert(log).clone();
        let healing = self.begin(Stage::Heal, observer, |run, observer| {
            let Some((train, choosing)) = &run.inputs.healing else {
                return Err(Error::recipe("heal", "there are no windows to heal on"));
            };
            let teacher = heal.losses.need_teacher().then_some(Teacher::Model(&dense));
            // A run that was killed right after it had written its weights left its state too.
            let goes_on = heal.state_file.as_ref().is_some_and(|state| state.exists());
            let healed = heal.run(&folded, train, Some(choosing), teacher, observer)?;
            if weights.exists() && !goes_on {
                std::fs::remove_dir_all(&weights).map_err(Error::io("remove", &weights))?;
            }
            if !weights.exists() {
                let compact = SaveOptions::from(Format::Compact);
                run.inputs.checkpoint.save(&healed.decoder, None, &weights, &compact, observer)?;
            }
            let healing = Healing { report: healed.report, curve: curve(&read_log(&log)?) };
            run.inputs.work.keep(HEALED, &key, &healing)?;
            run.result = Some(healed.decoder);
            Ok(healing)
        })?;
        if state.exists() {
            std::fs::remove_file(&state).map_err(Error::io("remove", &state))?;
        }
        Ok(Some(healing))
    }

    /// The numbers of a model on what evaluates: of the blocks `kept` read from disk, or of a decoder.
    fn measured(
        &mut self,
        key: &Key,
        kept: &[usize],
        observer: &mut dyn Observer,
        decoder: impl FnOnce(&mut Self, &mut dyn Observer) -> Result<Decoder>,
    ) -> Result<Measured> {
        let decoder = |run: &mut Self, observer: &mut dyn Observer| {
            if run.streams() { Ok(None) } else { decoder(run, observer).map(Some) }
        };
        self.stage_with(Stage::Evaluate, EVALUATION, key, observer, decoder, |run, decoder, observer| {
            match &decoder {
                Some(decoder) => run.inputs.measure(decoder, observer),
                None => run.inputs.measure_streamed(kept, observer),
            }
        })
    }

    /// Whether the model stays on disk.
    pub(super) fn streams(&self) -> bool {
        self.inputs.streamed.is_some()
    }

    /// How fast the dense model and the result are, side by side.
    fn latency(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<Option<(Latency, Latency)>> {
        let (Some(options), Some(key)) = (self.inputs.recipe.latency, self.keys.latency.clone()) else {
            return Ok(None);
        };
        let models = |run: &mut Self, observer: &mut dyn Observer| {
            Ok((run.dense(observer)?, run.result(plan, observer)?))
        };
        let measure = |_: &mut Self, (dense, result): (Decoder, Decoder), observer: &mut dyn Observer| {
            let measured = latency(&[&dense, &result], &options, observer)?;
            let pair: std::result::Result<[Latency; 2], _> = measured.try_into();
            pair.map(<(Latency, Latency)>::from).map_err(|_| Error::recipe("latency", "not two models"))
        };
        self.stage_with(Stage::Evaluate, LATENCY, &key, observer, models, measure).map(Some)
    }

    /// Fails where more was lost than may be.
    fn check_gate(&self, dense: &Measured, compressed: &Measured) -> Result<()> {
        let (dense, compressed) = (dense.perplexity.mean_nll, compressed.perplexity.mean_nll);
        match self.inputs.recipe.gate() {
            Some(limit) if compressed - dense > limit => {
                let targeted = self.inputs.recipe.max_nll_increase.is_none();
                let saved = self.saved.as_ref().map(|saved| saved.directory.clone());
                Err(Error::QualityGate { dense, compressed, limit, targeted, saved })
            }
            limit => {
                tracing::debug!(dense, compressed, limit, "lost no more than it may");
                Ok(())
            }
        }
    }

    /// The model as it was, in f32.
    pub(super) fn dense(&mut self, observer: &mut dyn Observer) -> Result<Decoder> {
        if let Some(dense) = &self.dense {
            return Ok(dense.clone());
        }
        let dense = self.inputs.checkpoint.decoder_observed(DType::F32, &Device::Cpu, observer)?;
        Ok(self.dense.insert(dense).clone())
    }

    /// The model without what goes, and with what is shared.
    pub(super) fn folded(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<Decoder> {
        if let Some(folded) = &self.folded {
            return Ok(folded.clone());
        }
        let dense = self.dense(observer)?;
        let folded = self.begin(Stage::Fold, observer, |run, observer| {
            fold_on(&dense, plan, &run.inputs.calibration, observer)
        })?;
        Ok(self.folded.insert(folded).clone())
    }

    /// What will be saved: the healed model, or the folded one.
    pub(super) fn result(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<Decoder> {
        if let Some(result) = &self.result {
            return Ok(result.clone());
        }
        let Some(key) = &self.keys.heal else { return self.folded(plan, observer) };
        let weights = Checkpoint::open(self.inputs.work.path(HEALED, key, ""))?;
        let healed = weights.decoder_observed(DType::F32, &Device::Cpu, observer)?;
        let healed = healed.stored_as(self.inputs.checkpoint.stored_types()).of_origins(&plan.kept())?;
        Ok(self.result.insert(healed).clone())
    }
}

pub(super) const SCORES: &str = "scores";
pub(super) const PLAN: &str = "plan";
/// Healed weights, and the report of their healing.
pub(super) const HEALED: &str = "healed";
pub(super) const EVALUATION: &str = "evaluation";
pub(super) const LATENCY: &str = "latency";
pub(super) const SAMPLES: &str = "samples";
pub(super) const SAVED: &str = "saved";
pub(super) const REPORT: &str = "report";

impl Inputs<'_> {
    /// The numbers of a model in memory.
    fn measure(&self, decoder: &Decoder, observer: &mut dyn Observer) -> Result<Measured> {
        let perplexity = perplexity(decoder, &self.evaluation, observer)?;
        let answer = |task: &Task| -> Result<(String, Accuracy)> {
            Ok((task.name.clone(), accuracy(decoder, &self.tokenizer, task, &mut *observer)?))
        };
        let tasks = self.tasks.iter().map(answer).collect::<Result<BTreeMap<_, _>>>()?;
        let (blocks, parameters) = (decoder.depth(), decoder.parameter_count());
        let mut account = self.account(decoder.architecture(), decoder.stored_types());
        account.stored_bytes = compact_bytes(decoder)?;
        let account = Some(account);
        Ok(Measured { blocks, parameters, perplexity, tasks, account, latency: None })
    }

    /// Those of the blocks `kept`, read from disk.
    fn measure_streamed(&self, kept: &[usize], observer: &mut dyn Observer) -> Result<Measured> {
        let model = self.stream(DType::F32)?.with_blocks(kept)?;
        let perplexity = perplexity_streamed(&model, &self.evaluation, observer)?;
        let (blocks, parameters) = (model.depth(), model.architecture().parameter_count());
        let stored = self.checkpoint.stored_types().of_blocks(kept);
        let account = Some(self.account(model.architecture(), stored));
        Ok(Measured { blocks, parameters, perplexity, tasks: BTreeMap::new(), account, latency: None })
    }

    /// What a model takes in f32.
    fn account(&self, arch: &Architecture, stored: StoredTypes) -> Account {
        let held = Held { stored, resident: DType::F32, context: self.evaluation.seq_len() };
        Account::planned(arch, &held)
    }
}
