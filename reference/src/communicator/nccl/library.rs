//! NCCL's library, found when it is first needed, and the functions of it that
//! are used.
//!
//! The types are cudarc's. Its loader is not used: it knows no `libnccl.so.2`,
//! which is the one name that NCCL has in distributions and in PyPI's packages,
//! and it panics where it finds nothing. Nor are its enumerations what comes
//! back from a call: a newer NCCL may know results that an older one did not,
//! so they are numbers here.

use super::CommunicatorError;
use crate::device::cuda_devices;
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use std::{
    env,
    error::Error,
    ffi::{CStr, OsStr, OsString, c_char, c_int, c_uint, c_void},
    mem,
    sync::OnceLock,
};

/// Names a library of NCCL, which is then the only one that is tried.
pub(super) const LIBRARY_VARIABLE: &str = "ULYSSES_NCCL";
/// libtorch's CUDA library has loaded the first already, where there is one.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The loader's flag by which a library finds its own functions before those
/// of another NCCL, libtorch's, in this process.
const RTLD_DEEPBIND: c_int = 8;

/// The first NCCL in which a communicator that does not block can be split off,
/// ended and aborted alike.
const OLDEST: c_int = 21_800;

pub(super) const SUCCESS: c_uint = 0;
pub(super) const IN_PROGRESS: c_uint = 7;

/// Functions of `nccl.h`, by their names there.
pub(super) struct Library {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_uint,
    pub(super) comm_init_rank_config: unsafe extern "C" fn(
        *mut ncclComm_t,
        c_int,
        ncclUniqueId,
        c_int,
        *mut ncclConfig_t,
    ) -> c_uint,
    pub(super) comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut c_uint) -> c_uint,
    pub(super) comm_finalize: unsafe extern "C" fn(ncclComm_t) -> c_uint,
    pub(super) comm_destroy: unsafe extern "C" fn(ncclComm_t) -> c_uint,
    pub(super) comm_abort: unsafe extern "C" fn(ncclComm_t) -> c_uint,
    pub(super) group_start: unsafe extern "C" fn() -> c_uint,
    pub(super) group_end: unsafe extern "C" fn() -> c_uint,
    pub(super) send: unsafe extern "C" fn(
        *const c_void,
        usize,
        c_uint,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> c_uint,
    pub(super) receive:
        unsafe extern "C" fn(*mut c_void, usize, c_uint, c_int, ncclComm_t, cudaStream_t) -> c_uint,
    get_version: unsafe extern "C" fn(*mut c_int) -> c_uint,
    get_error_string: unsafe extern "C" fn(c_uint) -> *const c_char,
    get_last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    /// Whether it is a stand-in for NCCL that moves memory of the host, and says
    /// so by exporting a name. NCCL itself would let a GPU loose on it.
    pub(super) takes_host_memory: bool,
}

impl Library {
    /// NCCL, loaded for as long as the process lives.
    pub(super) fn get() -> Result<&'static Library, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY
            .get_or_init(Library::load)
            .as_ref()
            .map_err(Clone::clone)
    }

    fn load() -> Result<Library, String> {
        let chosen = env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
        let loaded = open(chosen.as_deref())?;
        let library = Library::of(&loaded)?;
        // Its functions are used until the end.
        mem::forget(loaded);
        let mut version = 0;
        // SAFETY: `version` is a place for the number.
        let code = unsafe { (library.get_version)(&raw mut version) };
        if code != SUCCESS || version < OLDEST {
            return Err(format!(
                "this NCCL is of version {version}, and 21800 or later is due: update it, or \
                 name one in {LIBRARY_VARIABLE}"
            ));
        }
        Ok(library)
    }

    fn of(loaded: &Loaded) -> Result<Library, String> {
        /// # Safety
        /// `F` is the type of the function of that name.
        unsafe fn function<F: Copy>(loaded: &Loaded, name: &str) -> Result<F, String> {
            // SAFETY: by the caller.
            match unsafe { loaded.get::<F>(name) } {
                Ok(symbol) => Ok(*symbol),
                Err(_) => Err(format!(
                    "what is loaded as NCCL has no function {name}, and 2.18 or later is due: \
                     update it, or name one in {LIBRARY_VARIABLE}"
                )),
            }
        }
        // SAFETY: the types of the fields are those of `nccl.h`, which has kept
        // them since 2.18; an enumeration of C is an unsigned int there.
        unsafe {
            Ok(Library {
                get_unique_id: function(loaded, "ncclGetUniqueId")?,
                comm_init_rank_config: function(loaded, "ncclCommInitRankConfig")?,
                comm_get_async_error: function(loaded, "ncclCommGetAsyncError")?,
                comm_finalize: function(loaded, "ncclCommFinalize")?,
                comm_destroy: function(loaded, "ncclCommDestroy")?,
                comm_abort: function(loaded, "ncclCommAbort")?,
                group_start: function(loaded, "ncclGroupStart")?,
                group_end: function(loaded, "ncclGroupEnd")?,
                send: function(loaded, "ncclSend")?,
                receive: function(loaded, "ncclRecv")?,
                get_version: function(loaded, "ncclGetVersion")?,
                get_error_string: function(loaded, "ncclGetErrorString")?,
                get_last_error: function(loaded, "ncclGetLastError")?,
                takes_host_memory: function::<*const c_void>(
                    loaded,
                    "ulysses_nccl_takes_host_memory",
                )
                .is_ok(),
            })
        }
    }

    /// An error value for any result but success, and that it goes on.
    pub(super) fn check(
        &self,
        operation: &'static str,
        code: c_uint,
    ) -> Result<(), CommunicatorError> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            _ => Err(CommunicatorError::Nccl {
                operation,
                message: self.words(code),
            }),
        }
    }

    /// What NCCL says of a result, and of what happened last in this process.
    fn words(&self, code: c_uint) -> String {
        // SAFETY: both give texts that end with a zero and are of the library's
        // own; the second asks for no communicator since 2.13.
        let [result, last] = unsafe {
            [
                (self.get_error_string)(code),
                (self.get_last_error)(std::ptr::null_mut()),
            ]
            .map(|text| match text.is_null() {
                true => String::new(),
                false => CStr::from_ptr(text).to_string_lossy().trim().to_owned(),
            })
        };
        match last.is_empty() {
            true => result,
            false => format!("{result}: {last}"),
        }
    }
}

/// The library that was chosen, or the first that is there.
fn open(chosen: Option<&OsStr>) -> Result<Loaded, String> {
    let Some(path) = chosen else {
        // Where there is a GPU, this loads the NCCL that libtorch brings.
        let _ = cuda_devices();
        let failures: Vec<String> = match NAMES.map(|name| load(name.as_ref(), 0)) {
            [Ok(loaded), _] | [_, Ok(loaded)] => return Ok(loaded),
            failures => failures.into_iter().filter_map(Result::err).collect(),
        };
        return Err(format!(
            "NCCL is not there: neither {} loads ({}); install it (`pip install nvidia-nccl-cu13`) \
             and give its path in {LIBRARY_VARIABLE}, or use the communicator over MPI",
            NAMES.join(" nor "),
            failures.join("; ")
        ));
    };
    load(path, RTLD_DEEPBIND).map_err(|error| {
        format!(
            "NCCL is not there: {LIBRARY_VARIABLE} is {} ({error}); give the path of a libnccl.so.2",
            OsString::from(path).display()
        )
    })
}

fn load(name: &OsStr, flags: c_int) -> Result<Loaded, String> {
    // SAFETY: what NCCL does when it is loaded is what it does to every program
    // that is linked with it.
    unsafe { Loaded::open(Some(name), RTLD_NOW | RTLD_LOCAL | flags) }.map_err(|error| {
        // The loader's own words, which say of which file.
        let words = error.source().map(ToString::to_string);
        words.unwrap_or_else(|| error.to_string())
    })
}
