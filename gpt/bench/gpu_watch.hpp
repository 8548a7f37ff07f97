// Clock, temperature and power of the process's GPU while something runs, as the driver's management library tells
// them: a record says with these under which conditions its times were taken. Without the library there is nothing to
// tell.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <stop_token>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

namespace strobe::gpt {

class GpuWatch {
public:
    GpuWatch() {
        void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) return;
        const auto init = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
        const auto by_bus = reinterpret_cast<int (*)(const char*, void**)>(
            dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
        clock_ = reinterpret_cast<Query>(dlsym(library, "nvmlDeviceGetClockInfo"));
        temperature_ = reinterpret_cast<Query>(dlsym(library, "nvmlDeviceGetTemperature"));
        power_ = reinterpret_cast<decltype(power_)>(dlsym(library, "nvmlDeviceGetPowerUsage"));
        energy_ = reinterpret_cast<decltype(energy_)>(dlsym(library, "nvmlDeviceGetTotalEnergyConsumption"));
        int device = 0;
        char bus[32] = {};
        if (cudaGetDevice(&device) != cudaSuccess) return;
        if (cudaDeviceGetPCIBusId(bus, sizeof bus, device) != cudaSuccess) return;
        if (!init || !by_bus || !clock_ || !temperature_ || !power_ || init() != 0) return;
        if (by_bus(bus, &gpu_) != 0) gpu_ = nullptr;
    }

    /// From here on a thread asks every 100 ms.
    void begin() {
        samples_.clear();
        if (!gpu_) return;
        energy_at_first_ = joules();
        thread_ = std::jthread([this](const std::stop_token& stop) {
            while (!stop.stop_requested()) {
                Sample s;
                const bool told = clock_(gpu_, 1, &s.mhz) == 0 && temperature_(gpu_, 0, &s.celsius) == 0 &&
                                  power_(gpu_, &s.milliwatts) == 0;
                if (told) samples_.push_back(s);
                std::this_thread::sleep_for(std::chrono::milliseconds(100));
            }
        });
    }
    /// Least, median and greatest of each since begin(), and the energy; null where nothing was told.
    nlohmann::ordered_json end() {
        if (thread_.joinable()) {
            thread_.request_stop();
            thread_.join();
        }
        if (samples_.empty()) return nullptr;
        const auto row = [&](unsigned Sample::* field, double unit) {
            std::vector<unsigned> values;
            for (const Sample& s : samples_) values.push_back(s.*field);
            std::ranges::sort(values);
            return std::vector<double>{unit * values.front(), unit * values[values.size() / 2], unit * values.back()};
        };
        return {{"samples", samples_.size()},
                {"sm_mhz", row(&Sample::mhz, 1.0)},
                {"celsius", row(&Sample::celsius, 1.0)},
                {"watts", row(&Sample::milliwatts, 1e-3)},
                {"joules", joules() - energy_at_first_}};
    }
    /// Since the driver was loaded; 0 where it is not told.
    double joules() const {
        unsigned long long millijoules = 0;
        return gpu_ && energy_ && energy_(gpu_, &millijoules) == 0 ? 1e-3 * static_cast<double>(millijoules) : 0.0;
    }

private:
    struct Sample {
        unsigned mhz = 0, celsius = 0, milliwatts = 0;
    };
    using Query = int (*)(void*, int, unsigned*);  // nvmlReturn_t (nvmlDevice_t, an enumeration, unsigned*)

    void* gpu_ = nullptr;
    Query clock_ = nullptr, temperature_ = nullptr;
    int (*power_)(void*, unsigned*) = nullptr;
    int (*energy_)(void*, unsigned long long*) = nullptr;
    double energy_at_first_ = 0.0;
    std::vector<Sample> samples_;  // of the thread's, while it runs
    std::jthread thread_;
};

}  // namespace strobe::gpt
