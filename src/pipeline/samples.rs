//! How the models before and after go on with a text.

use std::ops::ControlFlow;

use super::inputs::{Inputs, SampleKeys};
use super::report::Sample;
use super::run::{Run, SAMPLES};
use super::stage::Stage;
use super::work::Key;
use crate::error::{Error, Result};
use crate::generate::Generate;
use crate::model::Decoder;
use crate::plan::Plan;
use crate::progress::{self, Observer};

/// Tokens of a window of the evaluation text that begin a sample, at most.
const BEGINNING: usize = 24;
const STAGE: &str = "samples";

impl Inputs<'_> {
    /// The beginnings that are continued: those that were asked for, or those of two windows that evaluate;
    /// none where blocks are read from disk.
    pub(super) fn prompts(&self) -> Result<Vec<String>> {
        let options = &self.recipe.samples;
        // Every token would read all blocks.
        if self.streamed.is_some() {
            return Ok(Vec::new());
        }
        if options.tokens == 0 || !options.prompts.is_empty() {
            let asked = if options.tokens == 0 { 0 } else { options.prompts.len() };
            return Ok(options.prompts.iter().take(asked).cloned().collect());
        }
        let windows = &self.evaluation;
        let mut places = vec![0, windows.len() / 2];
        places.dedup();
        let bos = usize::from(windows.bos());
        let beginning = |place: usize| {
            let ids = windows.window(place)?.iter().skip(bos).take(BEGINNING.min(windows.seq_len() / 2));
            self.tokenizer.decode(&ids.copied().collect::<Vec<_>>())
        };
        let mut prompts = places.into_iter().map(beginning).collect::<Result<Vec<_>>>()?;
        prompts.retain(|prompt| !prompt.is_empty());
        Ok(prompts)
    }

    /// What a model makes of each beginning, without the beginning.
    pub(super) fn continued(
        &self,
        decoder: &Decoder,
        prompts: &[String],
        observer: &mut dyn Observer,
    ) -> Result<Vec<String>> {
        let tokens = self.recipe.samples.tokens;
        let options = Generate { max_tokens: tokens, ..Generate::default() };
        let of = |count: usize| count.saturating_mul(tokens) as u64;
        let total = of(prompts.len());
        progress::counted(STAGE, total, observer, |report| {
            let mut texts = Vec::new();
            for (place, prompt) in prompts.iter().enumerate() {
                let (mut text, mut stopped) = (String::new(), None::<Error>);
                let (mut done, most) = (of(place), of(place + 1));
                options.run(decoder, &self.tokenizer, prompt, |piece| {
                    text.push_str(piece);
                    done = (done + 1).min(most);
                    stopped = report(done).err();
                    if stopped.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })?;
                if let Some(error) = stopped {
                    return Err(error);
                }
                texts.push(text);
                report(most)?;
            }
            Ok(texts)
        })
    }
}

impl Run<'_> {
    /// How each model goes on with the samples' beginnings.
    pub(super) fn samples(&mut self, plan: &Plan, observer: &mut dyn Observer) -> Result<Vec<Sample>> {
        let prompts = self.inputs.prompts()?;
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let SampleKeys { dense, folded, compressed } = self.keys.samples.clone();
        let dense = self.continued(&dense, &prompts, observer, |run, observer| run.dense(observer))?;
        let folded = match self.keys.heal {
            Some(_) => {
                self.continued(&folded, &prompts, observer, |run, observer| run.folded(plan, observer))?
            }
            None => Vec::new(),
        };
        let result =
            self.continued(&compressed, &prompts, observer, |run, observer| run.result(plan, observer))?;
        let mut folded = folded.into_iter();
        let texts = prompts.into_iter().zip(dense).zip(result);
        let sample =
            |((prompt, dense), compressed)| Sample { prompt, dense, folded: folded.next(), compressed };
        Ok(texts.map(sample).collect())
    }

    fn continued(
        &mut self,
        key: &Key,
        prompts: &[String],
        observer: &mut dyn Observer,
        decoder: impl FnOnce(&mut Self, &mut dyn Observer) -> Result<Decoder>,
    ) -> Result<Vec<String>> {
        self.stage_with(Stage::Evaluate, SAMPLES, key, observer, decoder, |run, decoder, observer| {
            run.inputs.continued(&decoder, prompts, observer)
        })
    }
}
