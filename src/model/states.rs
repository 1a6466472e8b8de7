//! Hidden states between blocks: in memory as far as there is room, beyond that in a scratch file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// States of one size, by slot. What comes back is what was put there, bit for bit.
#[derive(Debug)]
pub(crate) struct States {
    slots: Vec<Option<State>>,
    /// Bytes that may still be held in memory; without a bound where absent.
    room: Option<u64>,
    /// Where the scratch file is made once it is needed. It has no name, and is gone when it is closed.
    directory: PathBuf,
    file: Option<File>,
    /// The bytes of each state.
    size: Option<u64>,
}

#[derive(Debug)]
enum State {
    Held(Tensor),
    /// In the file, at the slot's place.
    Spilled {
        shape: Vec<usize>,
        dtype: DType,
        device: Device,
    },
}

impl States {
    /// All in memory.
    pub(crate) fn in_memory(slots: usize) -> Self {
        Self::new(slots, None, PathBuf::new())
    }

    /// At most `room` bytes in memory, and the rest in a file without a name in `directory`.
    pub(crate) fn new(slots: usize, room: Option<u64>, directory: PathBuf) -> Self {
        let slots = std::iter::repeat_with(|| None).take(slots).collect();
        Self { slots, room, directory, file: None, size: None }
    }

    /// Keeps a state in an empty slot.
    ///
    /// # Errors
    /// A slot that does not exist, a state of another size than the others, or a full disk.
    pub(crate) fn put(&mut self, slot: usize, state: Tensor) -> Result<()> {
        if slot >= self.slots.len() {
            return Err(Error::argument("slot", slot, format!("less than {}", self.slots.len())));
        }
        let bytes = (state.elem_count() * state.dtype().size_in_bytes()) as u64;
        let size = *self.size.get_or_insert(bytes);
        if bytes != size {
            return Err(Error::argument("state", format!("{bytes} bytes"), format!("{size}, as all others")));
        }
        let kept = if self.room.is_none_or(|room| room >= bytes) {
            self.room = self.room.map(|room| room - bytes);
            State::Held(state)
        } else {
            self.write(slot as u64 * size, &state)?;
            let (shape, dtype) = (state.dims().to_vec(), state.dtype());
            State::Spilled { shape, dtype, device: state.device().clone() }
        };
        self.slots[slot] = Some(kept);
        Ok(())
    }

    /// Takes a state out of its slot.
    ///
    /// # Errors
    /// An empty slot, or a file that cannot be read.
    pub(crate) fn take(&mut self, slot: usize) -> Result<Tensor> {
        match self.slots.get_mut(slot).and_then(Option::take) {
            Some(State::Held(state)) => {
                self.room = self.room.map(|room| room + self.size.unwrap_or_default());
                Ok(state)
            }
            Some(State::Spilled { shape, dtype, device }) => {
                let bytes = self.read(slot)?;
                let state = Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu)?;
                Ok(state.to_device(&device)?)
            }
            None => Err(Error::argument("slot", slot, "one that holds a state")),
        }
    }

    fn write(&mut self, offset: u64, state: &Tensor) -> Result<()> {
        let mut bytes = Vec::with_capacity(state.elem_count() * state.dtype().size_in_bytes());
        state.to_device(&Device::Cpu)?.write_bytes(&mut bytes)?;
        if self.file.is_none() {
            let made = tempfile::tempfile_in(&self.directory);
            self.file = Some(made.map_err(Error::io("create a scratch file in", &self.directory))?);
        }
        let written = self.file.as_mut().map_or(Ok(()), |file| {
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(&bytes)
        });
        written.map_err(Error::io("write a scratch file in", &self.directory))
    }

    fn read(&mut self, slot: usize) -> Result<Vec<u8>> {
        let size = self.size.unwrap_or_default();
        let mut bytes = vec![0u8; size as usize];
        let nothing = || std::io::Error::other("nothing was written");
        let read = self.file.as_mut().ok_or_else(nothing).and_then(|file| {
            file.seek(SeekFrom::Start(slot as u64 * size))?;
            file.read_exact(&mut bytes)
        });
        read.map_err(Error::io("read a scratch file in", &self.directory))?;
        Ok(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn state(seed: u32) -> Tensor {
        let values: Vec<f32> =
            (0..12u32).map(|i| f32::from_bits(0x3f00_0000 + seed * 7919 + i * 31)).collect();
        Tensor::from_vec(values, (1, 3, 4), &Device::Cpu).unwrap()
    }

    fn bits(state: &Tensor) -> Vec<u32> {
        let values = state.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn states_come_back_bit_for_bit_however_much_room_there_is() {
        for room in [None, Some(0), Some(48), Some(100), Some(1 << 20)] {
            let mut states = States::new(5, room, std::env::temp_dir());
            for round in 0..3 {
                for slot in 0..5 {
                    states.put(slot, state(slot as u32 + round)).unwrap();
                }
                for slot in [3, 0, 4, 1, 2] {
                    let found = states.take(slot).unwrap();
                    assert_eq!(found.dims(), [1, 3, 4]);
                    assert_eq!(bits(&found), bits(&state(slot as u32 + round)), "{room:?} {slot}");
                }
            }
            assert_eq!(states.room, room, "what was taken gives its room back");
            assert_eq!(states.file.is_some(), room.is_some_and(|room| room < 5 * 48), "{room:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut states = States::new(2, Some(0), std::env::temp_dir().join("foldgpt-no-such-directory"));
        let error = states.put(0, state(1)).unwrap_err().to_string();
        assert!(error.contains("scratch file") && error.contains("no-such-directory"), "{error}");
        let mut states = States::in_memory(2);
        states.put(0, state(1)).unwrap();
        assert!(states.put(1, state(1).narrow(1, 0, 2).unwrap()).is_err());
        assert!(states.put(2, state(1)).is_err());
        assert!(states.take(1).is_err());
        states.take(0).unwrap();
        assert!(states.take(0).is_err());
    }
}
