//! One rank's call in a fixed number of words.
//!
//! The kernel is not among them: how a rank computes attention is its own
//! affair.

use crate::{autograd::grad_enabled, core_attention::Mask, options::Options};
use tch::{Device, Kind, Tensor};

const TENSOR_WORDS: usize = 8;
const OPTION_WORDS: usize = 5;
const WORDS: usize = 3 * TENSOR_WORDS + OPTION_WORDS;

/// What matters of one rank's call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Descriptor {
    /// Query, key and value.
    pub(super) tensors: [TensorDescriptor; 3],
    pub(super) mask: Mask,
    pub(super) scale: Option<f64>,
    pub(super) uneven_heads: bool,
    /// Whether backward can be called on the output. It holds collectives, so
    /// ranks must be of one mind.
    pub(super) differentiable: bool,
}

/// What matters of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TensorDescriptor {
    /// `None` for an undefined tensor.
    pub(super) dimensions: Option<i64>,
    /// Batch, tokens, heads and head size, if there are four dimensions.
    pub(super) size: [i64; 4],
    /// A position in [`DTYPES`], or -1 for any other dtype.
    pub(super) dtype: i64,
    /// The kind of device; ranks on GPUs of different number agree.
    pub(super) device: i64,
    /// Which device of its kind.
    device_index: i64,
}

/// The dtypes that attention is computed in.
pub(super) const DTYPES: [(Kind, &str); 4] = [
    (Kind::Double, "float64"),
    (Kind::Float, "float32"),
    (Kind::BFloat16, "bfloat16"),
    (Kind::Half, "float16"),
];

const DEVICES: [&str; 4] = ["cpu", "cuda", "mps", "vulkan"];

impl Descriptor {
    pub(super) fn of(tensors: [&Tensor; 3], options: &Options) -> Self {
        Self {
            tensors: tensors.map(TensorDescriptor::of),
            mask: options.mask,
            scale: options.scale,
            uneven_heads: options.uneven_heads,
            differentiable: grad_enabled()
                && tensors
                    .iter()
                    .any(|tensor| tensor.defined() && tensor.requires_grad()),
        }
    }

    pub(super) fn to_words(self) -> Vec<i64> {
        let tensors = self.tensors.iter().flat_map(|tensor| tensor.to_words());
        let options = [
            i64::from(self.mask == Mask::Causal),
            i64::from(self.scale.is_some()),
            // The bits: a scale that differs in the last place differs.
            self.scale.unwrap_or(0.0).to_bits().cast_signed(),
            i64::from(self.uneven_heads),
            i64::from(self.differentiable),
        ];
        tensors.chain(options).collect()
    }

    /// Nothing if these are not the words of a descriptor.
    pub(super) fn from_words(words: &[i64]) -> Option<Self> {
        let words: &[i64; WORDS] = words.try_into().ok()?;
        let (tensors, options) = words.split_at(3 * TENSOR_WORDS);
        let mut tensors = tensors
            .chunks_exact(TENSOR_WORDS)
            .map(TensorDescriptor::from_words);
        let &[causal, scaled, scale, uneven_heads, differentiable] = options else {
            return None;
        };
        Some(Self {
            tensors: [tensors.next()??, tensors.next()??, tensors.next()??],
            mask: if causal == 1 {
                Mask::Causal
            } else {
                Mask::Full
            },
            scale: (scaled == 1).then(|| f64::from_bits(scale.cast_unsigned())),
            uneven_heads: uneven_heads == 1,
            differentiable: differentiable == 1,
        })
    }

    pub(super) fn query(&self) -> &TensorDescriptor {
        &self.tensors[0]
    }

    pub(super) fn key(&self) -> &TensorDescriptor {
        &self.tensors[1]
    }
}

impl TensorDescriptor {
    fn of(tensor: &Tensor) -> Self {
        if !tensor.defined() {
            return Self {
                dimensions: None,
                size: [0; 4],
                dtype: -1,
                device: 0,
                device_index: 0,
            };
        }
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
        let [batch, tokens, heads, head_size] = self.size;
        let dimensions = self.dimensions.unwrap_or(-1);
        [
            dimensions,
            batch,
            tokens,
            heads,
            head_size,
            self.dtype,
            self.device,
            self.device_index,
        ]
    }

    fn from_words(words: &[i64]) -> Option<Self> {
        let &[
            dimensions,
            batch,
            tokens,
            heads,
            head_size,
            dtype,
            device,
            device_index,
        ] = words
        else {
            return None;
        };
        Some(Self {
            dimensions: (dimensions >= 0).then_some(dimensions),
            size: [batch, tokens, heads, head_size],
            dtype,
            device,
            device_index,
        })
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
