//! The destination: what is written there, what is known to be there, and what stands beside it.

use std::io::Write;

use sha2::{Digest, Sha256};

use super::inputs::{Inputs, Keys};
use super::report::{Other, Report, SavedRecord};
use super::run::{REPORT, Run, SAVED};
use super::stage::Stage;
use crate::checkpoint::{CARD, Checkpoint, Format, ModelCard, SaveOptions};
use crate::data::hex;
use crate::error::{Error, Result};
use crate::file;
use crate::plan::Plan;
use crate::progress::Observer;

impl Run<'_> {
    /// Bytes of all tensors that will be saved.
    pub(super) fn bytes_to_save(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<u64> {
        let format = self.inputs.format(plan);
        if self.streams() {
            return self.inputs.checkpoint.bytes_to_copy(&plan.kept(), format);
        }
        let result = self.result(plan, observer)?;
        self.inputs.checkpoint.bytes_to_save(&result, format)
    }

    /// Saves the result with its card, unless that is done, and gives the hash of its weights.
    pub(super) fn save(&mut self, report: &Report, observer: &mut dyn Observer) -> Result<String> {
        let card = report.model_card(self.inputs.base_model());
        if let Some(saved) = self.saved.take().filter(SavedRecord::is_there) {
            let sha256 = saved.weights_sha256.clone();
            self.inputs.keep_card_in_step(&self.keys, saved, &card, report.format)?;
            return Ok(sha256);
        }
        let plan = &report.plan;
        let result = if self.streams() { None } else { Some(self.result(plan, observer)?) };
        let key = self.keys.save.clone();
        self.begin(Stage::Save, observer, |run, observer| {
            let Inputs { checkpoint, recipe, work, .. } = &run.inputs;
            let card_sha256 = sha256_of(&card.to_markdown(report.format));
            let options = SaveOptions { card: Some(card), ..SaveOptions::from(report.format) };
            let out = recipe.out.as_path();
            let prepared = match &result {
                Some(result) => {
                    // Adapters that are no part of a matrix after healing are no part of the plan either.
                    let same = plan.architecture(checkpoint.architecture())? == *result.architecture();
                    let plan = Some(plan).filter(|_| same);
                    checkpoint.prepare(result, plan, out, &options, observer)?
                }
                None => checkpoint.prepare_blocks(&plan.kept(), Some(plan), out, &options, observer)?,
            };
            let weights_sha256 = prepared.checkpoint.sha256(observer)?;
            let (directory, tensor_bytes) = (out.to_path_buf(), prepared.saved.tensor_bytes);
            let sha256 = weights_sha256.clone();
            // Before it is in its place: whoever is killed right after has to know it as its own.
            work.keep(SAVED, &key, &SavedRecord { directory, tensor_bytes, weights_sha256, card_sha256 })?;
            prepared.place()?;
            Ok(sha256)
        })
    }

    /// What other recipes with this working directory made of the same model, measured on the same windows.
    pub(super) fn others(&self, report: &Report) -> Result<Vec<Other>> {
        let known = self.inputs.work.results::<Report>(REPORT)?;
        let alike = known.into_iter().filter(|other| {
            other.saved_sha256 != report.saved_sha256
                && other.model_sha256 == report.model_sha256
                && other.compressed.perplexity.protocol() == report.compressed.perplexity.protocol()
        });
        let mut others: Vec<Other> = alike.map(Other::from).collect();
        others.sort_by(|a, b| {
            let size = a.parameters.cmp(&b.parameters);
            size.then(a.mean_nll.total_cmp(&b.mean_nll)).then_with(|| a.out.cmp(&b.out))
        });
        // Asked for with other tasks, say, one has several reports.
        others.dedup();
        Ok(others)
    }
}

impl SavedRecord {
    fn is_there(&self) -> bool {
        self.directory.join("config.json").exists()
    }
}

impl From<Report> for Other {
    fn from(report: Report) -> Self {
        let measured = report.compressed;
        Self {
            out: report.recipe.out,
            blocks: measured.blocks,
            parameters: measured.parameters,
            mean_nll: measured.perplexity.mean_nll,
            healed: report.heal.is_some(),
        }
    }
}

impl Inputs<'_> {
    /// What this recipe has saved, where it is still there.
    pub(super) fn saved(&self, keys: &Keys, observer: &mut dyn Observer) -> Result<Option<SavedRecord>> {
        let known: Option<SavedRecord> = self.work.known(SAVED, &keys.save)?;
        let Some(saved) = known.filter(SavedRecord::is_there) else { return Ok(None) };
        let sha256 = Checkpoint::open(&saved.directory)?.sha256(observer)?;
        Ok(Some(saved).filter(|saved| saved.weights_sha256 == sha256))
    }

    /// The hub id of the model that is compressed, as far as it is known.
    fn base_model(&self) -> Option<String> {
        self.recipe.base_model.clone().or_else(|| self.checkpoint.base_model())
    }

    /// Writes the card anew where the weights are known and what is said of them has changed, as when other tasks were
    /// answered. A card that is no more what was written is somebody's, and stays.
    fn keep_card_in_step(
        &self,
        keys: &Keys,
        mut saved: SavedRecord,
        card: &ModelCard,
        format: Format,
    ) -> Result<()> {
        let (card, path) = (card.to_markdown(format), saved.directory.join(CARD));
        let new = sha256_of(&card);
        if new == saved.card_sha256 || !path.is_file() {
            return Ok(());
        }
        let found = std::fs::read(&path).map_err(Error::io("read", &path))?;
        if hex(&Sha256::digest(found)) != saved.card_sha256 {
            return Ok(());
        }
        file::replace(&path, |file| file.write_all(card.as_bytes()).map_err(Error::io("write", &path)))?;
        saved.card_sha256 = new;
        self.work.keep(SAVED, &keys.save, &saved)
    }
}

/// What tells a card from one that somebody has changed.
fn sha256_of(card: &str) -> String {
    hex(&Sha256::digest(card))
}
