//! Which small files come first in a pack: those that programs need when they start.

/// True for files that programs are likely to read when they start: bytecode (sources, where there is none), extension
/// modules and metadata, but not tests. They are a quarter of what packs have.
pub(super) fn is_hot(path: &[u8], bytecode: bool) -> bool {
    const SELDOM: [&[u8]; 10] = [
        b"test",
        b"tests",
        b"testing",
        b"idlelib",
        b"lib2to3",
        b"tkinter",
        b"turtledemo",
        b"ensurepip",
        b"pydoc_data",
        b"include",
    ];
    if path.split(|b| *b == b'/').any(|part| SELDOM.contains(&part)) {
        return false;
    }
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    name.ends_with(b".pyc")
        || (!bytecode && name.ends_with(b".py"))
        || name.ends_with(b".so")
        || name.windows(4).any(|part| part == b".so.")
        || path.ends_with(b".dist-info/METADATA")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_read_when_they_start_comes_first() {
        let table = [
            ("lib/python3.13/site-packages/pandas/__pycache__/io.cpython-313.pyc", true),
            ("lib/python3.13/site-packages/pandas/io.py", false),
            ("lib/python3.13/site-packages/pandas/tests/__pycache__/x.cpython-313.pyc", false),
            ("lib/python3.13/site-packages/pandas/_libs/algos.cpython-313-x86_64-linux-gnu.so", true),
            ("lib/python3.13/site-packages/numpy.libs/libquadmath-1.so.0.0.0", true),
            ("lib/python3.13/site-packages/pandas-2.dist-info/METADATA", true),
            ("lib/python3.13/site-packages/pandas-2.dist-info/RECORD", false),
            ("lib/python3.13/site-packages/torch/include/ATen/ATen.h", false),
        ];
        for (path, hot) in table {
            assert_eq!(is_hot(path.as_bytes(), true), hot, "{path}");
        }
        assert!(is_hot(b"lib/python3.13/site-packages/x.py", false), "where there is no bytecode");
    }
}
