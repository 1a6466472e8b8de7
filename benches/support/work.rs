//! The work that is timed.

use std::cell::RefCell;
use std::hint::black_box;

use foldgpt::candle::{Device, Tensor};
use foldgpt::heal::{Budget, Heal, Lora, Losses, ParamGroup, Teacher, Trainable};
use foldgpt::importance::{Coupling, Gates};
use foldgpt::model::{KvCache, Unit, Walk};
use foldgpt::{Decoder, Windows};

/// The first window, and the same as a batch of one.
pub fn first(windows: &Windows) -> (&[u32], Tensor) {
    let window = windows.iter().next().unwrap();
    (window, Tensor::from_slice(window, (1, window.len()), &Device::Cpu).unwrap())
}

/// The blocks on the first window.
pub fn blocks(decoder: &Decoder, windows: &Windows) {
    black_box(decoder.hidden(&first(windows).1).unwrap());
}

/// The losses of the first window from these states after the last block.
pub fn head(decoder: &Decoder, windows: &Windows, hidden: &Tensor) {
    black_box(decoder.nll(hidden, first(windows).0).unwrap());
}

/// Blocks and head on every window, each without its last token.
pub fn forward(decoder: &Decoder, windows: &Windows) {
    for window in windows.iter() {
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        let ids = Tensor::from_slice(inputs, (1, inputs.len()), &Device::Cpu).unwrap();
        let hidden = decoder.hidden(&ids).unwrap().squeeze(0).unwrap();
        black_box(decoder.nll(&hidden, targets).unwrap());
    }
}

/// Every window forward and back to a gate on every block.
pub fn gate_step(decoder: &Decoder, windows: &Windows) {
    let units = Unit::blocks(decoder.depth());
    for window in windows.iter() {
        let ids = Tensor::from_slice(window, (1, window.len()), &Device::Cpu).unwrap();
        let walk = Walk::forward(decoder, &units, &vec![0.9; units.len()], &ids).unwrap();
        let (_, upstream) = decoder.loss_vjp(walk.output(), &window[1..]).unwrap();
        black_box(walk.gate_gradients(&upstream, |_| true).unwrap());
    }
}

/// Steps of training gates on all blocks, half of the windows in each: the two halves train a set of gates each.
pub fn gate_training(decoder: &Decoder, windows: &Windows, steps: usize) {
    let mut gates = Gates::default();
    (gates.remove, gates.steps, gates.batch) = (1, steps, windows.len() / 2);
    black_box(gates.train(decoder, windows, &Unit::blocks(decoder.depth()), &mut ()).unwrap());
}

/// Steps of healing on LoRA of rank 8, all windows in each; adapters stay, so that nothing but steps is timed.
pub fn lora(decoder: &Decoder, windows: &Windows, steps: usize, losses: Losses, teacher: Option<&Decoder>) {
    let mut lora = Lora::default();
    lora.merge = false;
    let mut heal = Heal::default();
    (heal.budget, heal.batch, heal.micro_batch) = (Budget::Steps(steps), windows.len(), 1);
    heal.groups = vec![ParamGroup::new(Trainable::Lora(lora), 1e-4)];
    heal.losses = losses;
    black_box(heal.run(decoder, windows, None, teacher.map(Teacher::Model), &mut ()).unwrap());
}

/// Exact coupling of the units; the blocks that it ran.
pub fn coupling(decoder: &Decoder, windows: &Windows, units: &[Unit]) -> f64 {
    Coupling::exact(decoder, windows, units, &mut ()).unwrap().block_runs
}

/// A model with a prompt in its cache, which decodes tokens after it again and again.
pub struct Decoding<'a> {
    decoder: &'a Decoder,
    cache: RefCell<KvCache>,
}

impl<'a> Decoding<'a> {
    pub const PROMPT: usize = 64;
    pub const TOKENS: usize = 16;

    pub fn new(decoder: &'a Decoder) -> Self {
        let decoding = Self { decoder, cache: RefCell::new(decoder.cache()) };
        decoding.read(&(0..Self::PROMPT as u32).collect::<Vec<_>>());
        decoding
    }

    fn read(&self, ids: &[u32]) {
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let hidden = self.decoder.extend(&ids, &mut self.cache.borrow_mut()).unwrap();
        let last = hidden.narrow(1, hidden.dim(1).unwrap() - 1, 1).unwrap();
        black_box(self.decoder.logits(&last).unwrap());
    }

    pub fn run(&self) {
        self.cache.borrow_mut().truncate(Self::PROMPT);
        for token in 0..Self::TOKENS as u32 {
            self.read(&[token * 97]);
        }
    }
}
