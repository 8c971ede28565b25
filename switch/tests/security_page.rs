//! `docs/security.md` names tests: each of them is there.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;

/// Names in the text between backticks, in order.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_the_page_names_is_where_it_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let threats = page.split("\n## Threats\n").nth(1).unwrap();
    let mut found = 0;
    let mut columns = Vec::new();
    for line in threats.lines().filter(|line| line.starts_with('|')) {
        // A file in the head of a column holds for the column, one in a cell for the names after it.
        for (column, cell) in line.split('|').enumerate() {
            let mut file: Option<String> = columns.get(column).cloned().flatten();
            for name in names(cell) {
                if name.ends_with(".rs") {
                    let text = fs::read_to_string(root.join(name));
                    file = Some(text.unwrap_or_else(|error| panic!("{name}: {error}")));
                } else if name.len() > 20 {
                    let file = file.as_ref().unwrap_or_else(|| panic!("{name} is in no file"));
                    assert!(file.contains(&format!("fn {name}(")), "{name} is not there");
                    found += 1;
                }
            }
            if line.starts_with("| class ") {
                columns.resize(column + 1, None);
                columns[column] = file;
            }
        }
    }
    assert!(found > 30, "{found} tests");
}

/// In two pieces, or it would be counted here.
const WORD: &str = concat!("un", "safe");

/// What a line of code says, without its comment. No string of the project has the word in it
/// behind `//`.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// The programs' and libraries' source files, those of their tests included, by their path from `root`.
/// Not the fuzz targets, which are a workspace of their own.
fn sources(root: &Path, folder: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{folder}/{}", entry.file_name().into_string().unwrap());
        if entry.file_type().unwrap().is_dir() {
            if path != "tests/fuzz" {
                sources(root, &path, found);
            }
        } else if path.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// How often each form of `unsafe` occurs in a file: blocks, functions, implementations, and blocks
/// of foreign items.
fn unsafe_of(text: &str) -> [usize; 4] {
    let mut counts = [0; 4];
    let code: String = text.lines().flat_map(|line| [code(line), "\n"]).collect();
    let word = |character: char| character.is_alphanumeric() || character == '_';
    let mut words = code.match_indices(WORD).filter(|(at, found)| {
        let before = code[..*at].chars().next_back();
        let behind = code[at + found.len()..].chars().next();
        !before.is_some_and(word) && !behind.is_some_and(word)
    });
    for (at, found) in &mut words {
        let rest = code[at + found.len()..].trim_start();
        let kind = match rest.split(|character: char| !word(character)).next().unwrap() {
            "" if rest.starts_with('{') => 0,
            "fn" => 1,
            "impl" => 2,
            "extern" => 3,
            _ => panic!("what is this: {WORD} {}", rest.lines().next().unwrap()),
        };
        counts[kind] += 1;
    }
    counts
}

#[test]
fn the_page_lists_all_unsafe_code_and_no_other_file_may_have_any() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let start = page.find(&format!("<!-- {WORD} code -->\n")).unwrap();
    let end = page.find(&format!("<!-- end of {WORD} code -->")).unwrap();
    let mut written = Vec::new();
    for line in page[start..end].lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, file, counts, what, why, _] = cells[..] else { panic!("five cells: {line}") };
        assert!(what.len() > 10 && why.len() > 30, "what for, and why it is sound: {line}");
        written.push(format!("{} {counts}", names(file).next().unwrap()));
    }

    let mut files = Vec::new();
    for folder in ["iommu", "vhost-pci-device", "guest-driver-model", "switch", "examples", "tests"] {
        sources(&root, folder, &mut files);
    }
    let mut there = Vec::new();
    for file in &files {
        let counts = unsafe_of(&fs::read_to_string(root.join(file)).unwrap());
        let forms =
            ["blocks", "fns", "impls", "externs"].into_iter().zip(counts).filter(|(_, count)| *count > 0);
        let forms: Vec<_> = forms.map(|(form, count)| format!("{form} {count}")).collect();
        if !forms.is_empty() {
            let named = ["/sys.rs", "/sys/", "/shm.rs", "/shm/"].iter().any(|part| file.contains(part));
            assert!(named, "{file} has {forms:?}, and its name does not say so");
            there.push(format!("{file} {}", forms.join(", ")));
        }
    }
    written.sort_unstable();
    there.sort_unstable();
    assert!(written == there, "docs/security.md should have\n{}\n", there.join("\n"));

    // A crate without any says that it never will, one with some that it is only where allowed.
    let mut crates = 0;
    for file in files.iter().filter(|file| !file.contains("/tests/")) {
        let (folder, name) = file.rsplit_once('/').unwrap();
        let its_own = match name {
            "lib.rs" if folder.ends_with("/src") => folder,
            "main.rs" if !folder.ends_with("/src") => folder,
            "main.rs" => file,
            _ if folder.ends_with("/src/bin") => file,
            _ => continue,
        };
        let has = there
            .iter()
            .any(|line| line.strip_prefix(its_own).is_some_and(|rest| rest.starts_with(['/', ' '])));
        let wanted = if has { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
        let text = fs::read_to_string(root.join(file)).unwrap();
        assert!(text.lines().any(|line| line == wanted), "{file} should say {wanted}");
        crates += 1;
    }
    assert!(crates > 12, "{crates} crates");
}
