//! One rank's call in a fixed number of words.
//!
//! The kernel is not among them: how a rank computes attention is its own
//! affair.

use super::settings::{self, Setting};
use crate::{
    autograd::grad_enabled,
    call::{Call, Documents},
    options::{Options, SequenceLength},
};
use tch::{Device, Kind, Tensor};

const TENSOR_WORDS: usize = 8;
const TENSORS: usize = 3;
const SIDE_TENSORS: usize = 6;
const OWN_WORDS: usize = 8;

/// What matters of one rank's call.
#[derive(Debug, Clone)]
pub(super) struct Descriptor {
    /// Query, key and value.
    pub(super) tensors: [TensorDescriptor; TENSORS],
    pub(super) side: SideTensors,
    /// Whether backward can be called on the output. It holds collectives, so
    /// ranks must be of one mind.
    pub(super) differentiable: bool,
    /// How many tokens this rank always has, if that is fixed.
    pub(super) fixed_local: Option<i64>,
    pub(super) ends: Option<EndsDescriptor>,
    /// The query heads, and the blocks of the sequence, that a layout is for.
    pub(super) layout: Option<[i64; 2]>,
    /// What must be the same on every rank.
    pub(super) settings: Vec<Setting>,
}

/// The tensors of a [`Call`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SideTensors {
    pub(super) position_ids: TensorDescriptor,
    pub(super) attention_mask: TensorDescriptor,
    pub(super) slopes: TensorDescriptor,
    pub(super) sinks: TensorDescriptor,
    pub(super) query_norm: TensorDescriptor,
    pub(super) key_norm: TensorDescriptor,
}

/// The ends of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndsDescriptor {
    pub(super) rows: i64,
    /// The first row whose ends go down, or -1.
    pub(super) falling_row: i64,
    /// The least and the greatest last end of a row.
    pub(super) last: [i64; 2],
}

/// What matters of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TensorDescriptor {
    /// `None` for an undefined tensor, and for one that was not given.
    pub(super) dimensions: Option<i64>,
    /// The first four sizes, filled up with zeros.
    pub(super) size: [i64; 4],
    /// A position in [`DTYPES`], or -1 for any other dtype.
    pub(super) dtype: i64,
    /// The kind of device; ranks on GPUs of different number agree.
    pub(super) device: i64,
    /// Which device of its kind.
    device_index: i64,
}

/// The dtypes that arguments have.
const DTYPES: [(Kind, &str); 6] = [
    (Kind::Double, "float64"),
    (Kind::Float, "float32"),
    (Kind::BFloat16, "bfloat16"),
    (Kind::Half, "float16"),
    (Kind::Int64, "int64"),
    (Kind::Bool, "bool"),
];

/// The names of those that attention is computed in.
pub(super) const FLOATS: [&str; 4] = ["float64", "float32", "bfloat16", "float16"];

const DEVICES: [&str; 4] = ["cpu", "cuda", "mps", "vulkan"];

impl Descriptor {
    pub(super) fn of(tensors: [&Tensor; TENSORS], call: &Call<'_>, options: &Options) -> Self {
        let learned = [
            call.slopes,
            call.sinks,
            call.head_norm.map(|norm| norm.query),
            call.head_norm.map(|norm| norm.key),
        ];
        let differentiable = tensors
            .into_iter()
            .chain(learned.into_iter().flatten())
            .any(|tensor| tensor.defined() && tensor.requires_grad());
        Self {
            tensors: tensors.map(|tensor| TensorDescriptor::of(Some(tensor))),
            side: SideTensors::of(call),
            differentiable: grad_enabled() && differentiable,
            fixed_local: match options.sequence_length {
                SequenceLength::Variable => None,
                SequenceLength::Fixed { local, .. } => Some(local as i64),
            },
            ends: EndsDescriptor::of(call),
            layout: call
                .layout
                .map(|layout| [layout.heads() as i64, layout.blocks() as i64]),
            settings: settings::of(options, call),
        }
    }

    pub(super) fn to_words(&self) -> Vec<i64> {
        let ends = self.ends.unwrap_or(EndsDescriptor {
            rows: -1,
            falling_row: -1,
            last: [0; 2],
        });
        let layout = self.layout.unwrap_or([-1; 2]);
        let own = [
            i64::from(self.differentiable),
            self.fixed_local.unwrap_or(-1),
            ends.rows,
            ends.falling_row,
            ends.last[0],
            ends.last[1],
            layout[0],
            layout[1],
        ];
        let tensors = self.tensors.iter().copied().chain(self.side.all());
        tensors
            .flat_map(TensorDescriptor::to_words)
            .chain(own)
            .chain(self.settings.iter().map(|setting| setting.word))
            .collect()
    }

    /// The descriptor that another rank put into these words; nothing if they
    /// are not those of a descriptor.
    pub(super) fn like(&self, words: &[i64]) -> Option<Self> {
        let (tensors, rest) = words.split_at_checked((TENSORS + SIDE_TENSORS) * TENSOR_WORDS)?;
        let (own, settings) = rest.split_at_checked(OWN_WORDS)?;
        if settings.len() != self.settings.len() {
            return None;
        }
        let tensors: Vec<_> = tensors
            .chunks_exact(TENSOR_WORDS)
            .map(TensorDescriptor::from_words)
            .collect::<Option<_>>()?;
        let (tensors, side) = tensors.split_first_chunk::<TENSORS>()?;
        let &[
            differentiable,
            fixed_local,
            rows,
            falling_row,
            least,
            most,
            heads,
            blocks,
        ] = own
        else {
            return None;
        };
        Some(Self {
            tensors: *tensors,
            side: SideTensors::from_all(side.try_into().ok()?),
            differentiable: differentiable == 1,
            fixed_local: (fixed_local >= 0).then_some(fixed_local),
            ends: (rows >= 0).then_some(EndsDescriptor {
                rows,
                falling_row,
                last: [least, most],
            }),
            layout: (heads >= 0).then_some([heads, blocks]),
            settings: self
                .settings
                .iter()
                .zip(settings)
                .map(|(setting, &word)| setting.with(word))
                .collect(),
        })
    }

    pub(super) fn query(&self) -> &TensorDescriptor {
        &self.tensors[0]
    }

    pub(super) fn key(&self) -> &TensorDescriptor {
        &self.tensors[1]
    }

    pub(super) fn value(&self) -> &TensorDescriptor {
        &self.tensors[2]
    }
}

impl SideTensors {
    fn of(call: &Call<'_>) -> Self {
        Self::from_all(
            [
                call.position_ids,
                call.attention_mask,
                call.slopes,
                call.sinks,
                call.head_norm.map(|norm| norm.query),
                call.head_norm.map(|norm| norm.key),
            ]
            .map(TensorDescriptor::of),
        )
    }

    /// The arguments that these are, in the order of [`all`](Self::all).
    pub(super) const NAMES: [&'static str; SIDE_TENSORS] = [
        "position_ids",
        "attention_mask",
        "slopes",
        "sinks",
        "query_norm",
        "key_norm",
    ];

    pub(super) fn all(&self) -> [TensorDescriptor; SIDE_TENSORS] {
        [
            self.position_ids,
            self.attention_mask,
            self.slopes,
            self.sinks,
            self.query_norm,
            self.key_norm,
        ]
    }

    fn from_all(
        [
            position_ids,
            attention_mask,
            slopes,
            sinks,
            query_norm,
            key_norm,
        ]: [TensorDescriptor; SIDE_TENSORS],
    ) -> Self {
        Self {
            position_ids,
            attention_mask,
            slopes,
            sinks,
            query_norm,
            key_norm,
        }
    }
}

impl EndsDescriptor {
    fn of(call: &Call<'_>) -> Option<Self> {
        let Some(Documents::Ends(ends)) = call.documents else {
            return None;
        };
        let last = || {
            ends.iter()
                .map(|row| row.last().map_or(0, |&end| end as i64))
        };
        let falling_row = ends.iter().position(|row| !row.is_sorted());
        Some(Self {
            rows: ends.len() as i64,
            falling_row: falling_row.map_or(-1, |row| row as i64),
            last: [last().min().unwrap_or(0), last().max().unwrap_or(0)],
        })
    }
}

impl TensorDescriptor {
    fn of(tensor: Option<&Tensor>) -> Self {
        let Some(tensor) = tensor.filter(|tensor| tensor.defined()) else {
            return Self {
                dimensions: None,
                size: [0; 4],
                dtype: -1,
                device: 0,
                device_index: 0,
            };
        };
        let size = tensor.size();
        let kind = tensor.f_kind().ok();
        let (device, device_index) = match tensor.device() {
            Device::Cpu => (0, 0),
            Device::Cuda(index) => (1, index as i64),
            Device::Mps => (2, 0),
            Device::Vulkan => (3, 0),
        };
        Self {
            dimensions: Some(size.len() as i64),
            size: std::array::from_fn(|i| size.get(i).copied().unwrap_or(0)),
            dtype: DTYPES
                .iter()
                .position(|&(dtype, _)| Some(dtype) == kind)
                .map_or(-1, |position| position as i64),
            device,
            device_index,
        }
    }

    fn to_words(self) -> [i64; TENSOR_WORDS] {
        let [first, second, third, fourth] = self.size;
        let dimensions = self.dimensions.unwrap_or(-1);
        [
            dimensions,
            first,
            second,
            third,
            fourth,
            self.dtype,
            self.device,
            self.device_index,
        ]
    }

    fn from_words(words: &[i64]) -> Option<Self> {
        let &[
            dimensions,
            first,
            second,
            third,
            fourth,
            dtype,
            device,
            device_index,
        ] = words
        else {
            return None;
        };
        Some(Self {
            dimensions: (dimensions >= 0).then_some(dimensions),
            size: [first, second, third, fourth],
            dtype,
            device,
            device_index,
        })
    }

    /// Its sizes, of which four are known; none if it was not given.
    pub(super) fn shape(&self) -> Option<&[i64]> {
        let dimensions = usize::try_from(self.dimensions?).ok()?;
        Some(&self.size[..dimensions.min(4)])
    }

    pub(super) fn dtype_name(&self) -> Option<&'static str> {
        let position = usize::try_from(self.dtype).ok()?;
        DTYPES.get(position).map(|&(_, name)| name)
    }

    /// The device as torch writes it.
    pub(super) fn device_name(&self) -> String {
        let kind = usize::try_from(self.device)
            .ok()
            .and_then(|kind| DEVICES.get(kind));
        format!("{}:{}", kind.unwrap_or(&"unknown"), self.device_index)
    }
}
