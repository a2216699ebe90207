//! How many cores this process may use, and how many threads they run.

/// One for each core that this process may use. The hardware threads of a core share its multiply-add units and the L2
/// cache that a block of a convolution works in. On Linux they are counted once; elsewhere each counts as a core.
pub(super) fn count() -> usize {
    // This respects limits of a container, too.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    physical().map_or(threads, |cores| cores.clamp(1, threads))
}

/// The cores of the hardware threads on which Linux may run this process.
#[cfg(target_os = "linux")]
fn physical() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let siblings = |thread: &usize| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")).ok()
    };
    let cores = parse(allowed)?.iter().map(siblings).collect::<Option<std::collections::BTreeSet<String>>>()?;
    Some(cores.len())
}

#[cfg(not(target_os = "linux"))]
fn physical() -> Option<usize> {
    None
}

/// The numbers of a list such as `0-3,8`.
#[cfg(target_os = "linux")]
fn parse(list: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn lists_of_hardware_threads_are_read() {
        assert_eq!(parse("\t0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse("5"), Some(vec![5]));
        assert_eq!(parse(""), None);
        assert_eq!(parse("0-x"), None);
    }

    #[test]
    fn there_is_a_core_and_no_more_than_hardware_threads() {
        let threads = std::thread::available_parallelism().expect("a number of threads").get();
        assert!((1..=threads).contains(&count()));
    }
}
