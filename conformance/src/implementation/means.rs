//! By what means an implementation computes, and what those means can do.

use fixtures::{Dtype, Dtype::*};
use tch::{Device, Tensor};
use ulysses::{HeadPartition, Kernel, Mask, Score, Structure, core_attention};

use crate::tensor::kind;

/// On which device, and by which kernel of attention: dense attention, that an
/// answer may be bit-equal to, goes by the same, and the oracle by the same
/// device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// Where the tensors are.
    pub device: Device,
    /// The core attention.
    pub kernel: Kernel,
}

impl Default for Means {
    /// A CPU, and whichever kernel torch chooses.
    fn default() -> Means {
        Means {
            device: Device::Cpu,
            kernel: Kernel::Sdpa,
        }
    }
}

/// Whether a kernel takes an element type, and KV heads with several query heads.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The element type.
    pub dtype: Dtype,
    /// Whether there are fewer KV heads than query heads.
    pub is_grouped: bool,
    /// The last line of torch's refusal, if it refuses.
    pub refusal: Option<String>,
}

impl Offer {
    /// What these means offer, found out by trying: causal attention of 16
    /// tokens and 4 heads of 32 channels, forward and backward.
    ///
    /// # Errors
    ///
    /// If they offer nothing.
    pub fn of(means: Means) -> Result<Vec<Offer>, String> {
        let all = [F64, F32, Bf16, F16].into_iter().flat_map(|dtype| {
            [false, true].map(|is_grouped| Offer {
                dtype,
                is_grouped,
                refusal: refusal(means, dtype, is_grouped),
            })
        });
        let all: Vec<Offer> = all.collect();
        match all.iter().all(|offer| !offer.is_taken()) {
            false => Ok(all),
            true => Err(format!(
                "the kernel {} does not run on {:?}: {}",
                means.kernel.name(),
                means.device,
                all[0].refusal.as_deref().unwrap_or_default()
            )),
        }
    }

    /// Whether it is taken.
    pub fn is_taken(&self) -> bool {
        self.refusal.is_none()
    }
}

fn refusal(means: Means, dtype: Dtype, is_grouped: bool) -> Option<String> {
    let heads = if is_grouped { 2 } else { 4 };
    let tried = || -> ulysses::Result<()> {
        let leaf = |heads: usize| {
            Tensor::f_ones([1, heads as i64, 16, 32], (kind(dtype), means.device))?
                .f_set_requires_grad(true)
        };
        let (query, key, value) = (leaf(4)?, leaf(heads)?, leaf(heads)?);
        let map = HeadPartition::new(4, heads, 1)?.head_map(0);
        let causal = Score {
            mask: Mask::Causal,
            ..Score::default()
        };
        let none = Structure::default();
        core_attention(&query, &key, &value, &map, means.kernel, &causal, &none)?
            .f_sum(kind(dtype))?
            .f_backward()?;
        // What a device refuses it may say only when it is waited for.
        query.f_grad()?.f_double_value(&[0, 0, 0, 0])?;
        Ok(())
    };
    let words = tried().err()?.to_string();
    Some(words.lines().next().unwrap_or_default().to_owned())
}
