//! Windows taken forward and back under gates.

use std::ops::Range;

use candle_core::Tensor;

use crate::data::Windows;
use crate::error::Result;
use crate::model::{BlockSource, Gate, Pass, States, Unit, UnitGraph};

/// Gates of one forward pass, and their derivatives with respect to their parameters.
pub(super) struct Drawn {
    pub gates: Vec<f64>,
    pub slopes: Vec<f64>,
}

impl Drawn {
    fn gate(&self, place: usize) -> Gate {
        // A gate drawn at exactly 0 or 1 does not follow its parameter.
        let wanted = self.slopes.get(place).is_some_and(|slope| *slope != 0.0);
        Gate { value: self.gates.get(place).copied().unwrap_or(1.0), wanted }
    }
}

/// A window, and the gates that it goes through.
pub(super) struct Draw {
    pub window: usize,
    pub drawn: Drawn,
}

/// What came of one.
pub(super) struct Walked {
    /// The summed loss in nats.
    pub loss: f64,
    /// Its gradient by every gate that follows its parameter; 0 for the others.
    pub gradients: Vec<f64>,
    /// Blocks computed; a backward counts as two.
    pub block_runs: f64,
}

/// Takes windows forward through `units`, each under its gates, and back; as many together as the source of the blocks
/// asks for. Only the inputs of units are kept in between, or, with `keep_activations`, all that units compute, where
/// blocks stay in memory anyway. `tick` is called after every block.
pub(super) fn walk(
    source: &dyn BlockSource,
    windows: &Windows,
    units: &[Unit],
    draws: &[Draw],
    keep_activations: bool,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<Walked>> {
    let pass = source.pass_over(windows.seq_len())?;
    let mut walked = Vec::with_capacity(draws.len());
    for draws in draws.chunks(source.windows_at_once().max(1)) {
        let inputs = source.states(units.len() * draws.len());
        let graphs = (keep_activations && source.keeps_blocks())
            .then(|| (0..units.len() * draws.len()).map(|_| None).collect());
        let states = Vec::new();
        let mut batch = Batch { source, windows, units, pass: &pass, draws, inputs, graphs, states };
        batch.forward(tick)?;
        walked.extend(batch.back(tick)?);
    }
    Ok(walked)
}

/// A few windows on their way.
struct Batch<'a> {
    source: &'a dyn BlockSource,
    windows: &'a Windows,
    units: &'a [Unit],
    pass: &'a Pass<'a>,
    draws: &'a [Draw],
    /// The input of every unit that runs on the way back, by place and window.
    inputs: States,
    /// What units have computed, in the same places, where it is kept: of these the input need not be.
    graphs: Option<Vec<Option<UnitGraph>>>,
    /// Each window's state; on the way back, the gradient of its loss with respect to it.
    states: Vec<Tensor>,
}

impl Batch<'_> {
    fn slot(&self, place: usize, index: usize) -> usize {
        place * self.draws.len() + index
    }

    fn forward(&mut self, tick: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let (source, draws, device) = (self.source, self.draws, self.source.device());
        let front = source.front()?;
        // All of a model in memory; what is read from a checkpoint never is.
        front.check_not_quantized()?;
        for draw in draws {
            let x = front.embed(&self.windows.tensor(draw.window, device)?, self.pass)?;
            self.states.push(x.detach());
        }
        drop(front);
        let stretches = stretches(self.units);
        let order: Vec<usize> = stretches.iter().map(|(block, _)| *block).collect();
        let mut stretches = stretches.into_iter();
        source.visit(&order, &mut |block| {
            for place in stretches.next().map(|(_, places)| places).unwrap_or_default() {
                let Some(&unit) = self.units.get(place) else { continue };
                for (index, draw) in draws.iter().enumerate() {
                    let (gate, slot) = (draw.drawn.gate(place), self.slot(place, index));
                    let Some(state) = self.states.get_mut(index) else { continue };
                    let graph = self.graphs.as_mut().filter(|_| gate.value != 0.0);
                    if let Some(graph) = graph.and_then(|graphs| graphs.get_mut(slot)) {
                        let kept = graph.insert(block.unit_graph(unit, state, self.pass)?);
                        *state = kept.gated(gate.value, self.pass)?;
                        continue;
                    }
                    let next = block.gated(unit.part, gate.value, state, self.pass)?;
                    let input = std::mem::replace(state, next);
                    if gate.runs() {
                        self.inputs.put(slot, input)?;
                    }
                }
            }
            tick()
        })
    }

    fn back(&mut self, tick: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Walked>> {
        let (source, draws) = (self.source, self.draws);
        let mut walked = self.losses()?;
        let mut stretches = stretches(self.units);
        stretches.reverse();
        let order: Vec<usize> = stretches.iter().map(|(block, _)| *block).collect();
        let mut stretches = stretches.into_iter();
        source.visit(&order, &mut |block| {
            for place in stretches.next().map(|(_, places)| places).unwrap_or_default().rev() {
                let Some(&unit) = self.units.get(place) else { continue };
                for ((index, draw), walked) in draws.iter().enumerate().zip(&mut walked) {
                    let (gate, slot) = (draw.drawn.gate(place), self.slot(place, index));
                    let (Some(upstream), Some(gradient)) =
                        (self.states.get_mut(index), walked.gradients.get_mut(place))
                    else {
                        continue;
                    };
                    let graph = self.graphs.as_mut().and_then(|graphs| graphs.get_mut(slot)?.take());
                    if let Some(graph) = graph {
                        (*gradient, *upstream) = graph.gated_back(gate, upstream, self.pass)?;
                    } else if gate.runs() {
                        let x = self.inputs.take(slot)?;
                        (*gradient, *upstream) = block.gated_back(unit, gate, &x, upstream, self.pass)?;
                    }
                }
            }
            tick()
        })?;
        Ok(walked)
    }

    /// The loss of every window; its state becomes the gradient with respect to it.
    fn losses(&mut self) -> Result<Vec<Walked>> {
        let back = self.source.back()?;
        let (depth, units) = (self.source.architecture().depth(), self.units.len());
        let blocks_in_a_unit = depth.min(units) as f64 / units as f64;
        let mut walked = Vec::with_capacity(self.draws.len());
        for (state, draw) in self.states.iter_mut().zip(self.draws) {
            let targets = self.windows.window(draw.window)?.get(1..).unwrap_or_default();
            let (loss, upstream) = back.loss_vjp(state, targets)?;
            *state = upstream.detach();
            let runs = (0..units).map(|place| match draw.drawn.gate(place) {
                gate if gate.value != 0.0 => 3.0,
                gate if gate.wanted => 1.0,
                _ => 0.0,
            });
            let block_runs = blocks_in_a_unit * runs.sum::<f64>();
            walked.push(Walked { loss, gradients: vec![0.0; units], block_runs });
        }
        Ok(walked)
    }
}

/// Units of one block that follow each other: the block's index, and the places of its units.
fn stretches(units: &[Unit]) -> Vec<(usize, Range<usize>)> {
    let mut stretches: Vec<(usize, Range<usize>)> = Vec::new();
    for (place, unit) in units.iter().enumerate() {
        match stretches.last_mut() {
            Some((block, places)) if *block == unit.block => places.end = place + 1,
            _ => stretches.push((unit.block, place..place + 1)),
        }
    }
    stretches
}
