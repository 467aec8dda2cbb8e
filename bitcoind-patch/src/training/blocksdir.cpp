// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/blocksdir.h>

#include <kernel/chainparams.h>
#include <kernel/messagestartchars.h>
#include <primitives/block.h>
#include <primitives/transaction.h>
#include <serialize.h>
#include <tinyformat.h>
#include <training/validation.h>
#include <util/fs.h>
#include <util/fs_helpers.h>
#include <util/readwritefile.h>
#include <util/strencodings.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

/** Name of the file with the chain_id. */
static const std::string CHAIN_ID_FILE{"training_chain_id"};

/**
 * Whether the block files hold more than the genesis block, which is always the first. Asks no database.
 *
 * If the first file is missing, nobody knows: then any file that a node makes counts.
 */
static bool HasBlocks(const fs::path& blocks_dir, const CChainParams& chainparams)
{
    const fs::path first_file{blocks_dir / "blk00000.dat"};
    for (const auto& entry : fs::directory_iterator(blocks_dir)) {
        const std::string name{fs::PathToString(entry.path().filename())};
        if (name == ".lock" || name.starts_with(CHAIN_ID_FILE)) continue;
        if (!fs::exists(first_file)) return true;
        if (name.starts_with("blk") && entry.path() != first_file) return true;
    }
    // Each block has the network's magic and its size before it. The files are XORed with a key, and padded with zeros.
    const size_t end{std::tuple_size_v<MessageStartChars> + sizeof(uint32_t) + GetSerializeSize(TX_WITH_WITNESS(chainparams.GenesisBlock()))};
    const std::string start{ReadBinaryFile(first_file, end + std::tuple_size_v<MessageStartChars>).second};
    const std::string key{ReadBinaryFile(blocks_dir / "xor.dat").second};
    if (start.size() <= end) return false;
    for (size_t i{0}; i < start.size() - end; ++i) {
        const uint8_t plain(start[end + i] ^ (key.empty() ? 0 : key[(end + i) % key.size()]));
        if (plain != chainparams.MessageStart()[i]) return false;
    }
    return true;
}

/** Write a file, and have it on the disk before it gets its final name. */
static bool WriteDurably(const fs::path& path, const std::string& content)
{
    FILE* file{fsbridge::fopen(path, "wb")};
    if (!file) return false;
    const bool written{fwrite(content.data(), 1, content.size(), file) == content.size() && FileCommit(file)};
    return fclose(file) == 0 && written;
}

std::optional<std::string> BindBlocksDir(const fs::path& blocks_dir, const CChainParams& chainparams)
{
    const Consensus::Params& params{chainparams.GetConsensus()};
    const std::string chain_id{params.training ? HexStr(TrainingChainId(params)) : ""};
    const fs::path file{blocks_dir / fs::PathFromString(CHAIN_ID_FILE)};
    if (fs::exists(file)) {
        std::string stored{ReadBinaryFile(file).second};
        if (stored == chain_id + "\n") return std::nullopt;
        if (stored.ends_with('\n')) stored.pop_back();
        return strprintf("The blocks in %s are of the training network %s, but the options given define %s. Give the -training... options that they were made with, or another -datadir.",
                         fs::quoted(fs::PathToString(blocks_dir)), stored, params.training ? "training network " + chain_id : "no training network");
    }
    if (!params.training) return std::nullopt;
    if (HasBlocks(blocks_dir, chainparams)) {
        return strprintf("The blocks in %s are of no training network, but the options given define training network %s. Give no -training... options, or another -datadir.",
                         fs::quoted(fs::PathToString(blocks_dir)), chain_id);
    }
    const fs::path temporary{file + ".new"};
    if (!WriteDurably(temporary, chain_id + "\n") || !RenameOver(temporary, file)) {
        return strprintf("Cannot write %s.", fs::quoted(fs::PathToString(file)));
    }
    DirectoryCommit(blocks_dir);
    return std::nullopt;
}
